"""The short spelling of a whole recipe, ``W4A4KV4G64``: activations and cache taken out of it and put back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fewbits.activations.scheme import ActivationScheme


def split_scheme(text: str) -> tuple[str, str | None, str | None]:
    """Take activations and cache out of the short spelling of a whole recipe.

    Returns:
        The text for :meth:`fewbits.Scheme.parse`, and those for :meth:`ActivationScheme.parse`, None where not given.

    Example:
        >>> split_scheme("W4A4KV4G64")
        ('W4G64', 'A4', 'KV4')
        >>> split_scheme("W2A16G64")
        ('W2G64', 'A16', None)
    """
    end = r"(?=G-?\d+$|$)"
    match = re.search(rf"(?<=.)(A\d+)?(KV\d+)?{end}", text.strip())
    if match is None or not match[0]:
        return text, None, None
    text = text.strip()
    return text[: match.start()] + text[match.end() :], match[1], match[2]


def read_schemes(data: Any, where: str) -> dict[str, ActivationScheme]:
    """Activation schemes by module name, out of a file.

    Args:
        data: what the file holds; None for nothing.
        where: its place, for messages.

    Raises:
        ValueError: if it is no mapping of names to schemes.

    Example:
        >>> read_schemes({"attn": {"num_bits": 4}}, "config.json")["attn"].name
        'A4'
    """
    if not isinstance({} if data is None else data, Mapping):
        raise ValueError(f"{where} is {data!r}; a mapping of module names to activation schemes is needed")
    parsed = {str(name): ActivationScheme.parse(entry) for name, entry in (data or {}).items()}
    return {name: scheme for name, scheme in parsed.items() if scheme is not None}


def full_name(weights: str, activation: ActivationScheme | None, kv_cache: ActivationScheme | None = None) -> str:
    """The short spelling of weights, activations and cache together.

    Args:
        weights: name of the weights' scheme, with ``A16`` in it.
        activation: of the layer's input.
        kv_cache: of keys and values.

    Example:
        >>> full_name("W2A16G64", ActivationScheme(num_bits=8), ActivationScheme(num_bits=4))
        'W2A8KV4G64'
    """
    act = "A16" if activation is None else activation.name
    cache = "" if kv_cache is None else f"KV{kv_cache.num_bits}"
    return weights.replace("A16", act + cache, 1)


def read_spellings(name: str, text: str | None, value: Any) -> ActivationScheme | None:
    """One activation scheme from the text (``A4``) and the field (a mapping may leave the bits to the text).

    Args:
        name: of the field, for messages.
        text: what :func:`split_scheme` found, or None.
        value: what :meth:`ActivationScheme.parse` takes.

    Raises:
        ValueError: if both give bits and they differ, or one is wrong.

    Example:
        >>> read_spellings("activation", "A4", {"preset": "quest"}).summary
        'A4 dynamic per token, rms, centred, hadamard'
    """
    if text is None or value is None:
        return ActivationScheme.parse(value if text is None else text)
    num_bits = int(text.lstrip("AKV"))
    if isinstance(value, Mapping):
        value = {"num_bits": num_bits, **value}
    built = ActivationScheme.parse(value)
    if (16 if built is None else built.num_bits) != num_bits:
        raise ValueError(f"the scheme's text says {text}, but {name} says {value!r}; give the bits once")
    return built
