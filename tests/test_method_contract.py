"""Every method of the arena is held to the contract, at every scheme of the arena at which it is defined."""

from __future__ import annotations

import pytest

from fewbits.arena import METHODS, NotForScheme
from fewbits.arena.methods import rule_for
from fewbits.testing.methods import STEPS, check_method

SCHEMES = ("W2G32", "W1.58", "W1")


def cases() -> list[tuple[str, str]]:
    found = []
    for name, method in METHODS.items():
        for scheme in SCHEMES:
            try:
                rule_for(name, method, scheme, num_steps=STEPS)
            except NotForScheme:
                continue
            found.append((name, scheme))
    return found


@pytest.mark.parametrize(("name", "scheme"), cases())
def test_method_keeps_its_promises(name: str, scheme: str) -> None:
    check_method(name, scheme)


def test_a_broken_promise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.testing import methods

    monkeypatch.setattr(methods, "convert", lambda model: methods.tiny_llama())
    with pytest.raises(AssertionError, match="converted model differs"):
        check_method("ste", "W2G32")
