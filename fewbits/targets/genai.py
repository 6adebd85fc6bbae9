"""Target ``genai``: a folder for onnxruntime-genai, with fused attention and a cache, to generate text with.

The builder of onnxruntime-genai makes the graph: it imports a GPTQ folder of version 1 that holds our codes. Then the
tensors of every ``MatMulNBits`` are replaced by ours, in the form of the target ``onnx``, since the builder knows no
zero point between two codes and no scale but an fp16 one. That it has kept every code in its place is checked first.

What the builder would do by itself and is kept from doing: quantize the head and a tied embedding anew to 4 bits
(``nodes_to_exclude``), add 1 to Gemma's norms in bfloat16 (all other tensors are handed over in fp32), window attention
one token narrower than Transformers (such models are refused).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbits.io import read_json_object, write_json
from fewbits.qtensor import QTensor
from fewbits.quantizer import Packed
from fewbits.scheme import Scheme
from fewbits.targets.affine import Fit, Judgement, affine_fit, explain_misfit, stored_codes
from fewbits.targets.base import plain_tensors
from fewbits.targets.dequantized import reference_fp32
from fewbits.targets.engine import EngineCheck, with_version
from fewbits.targets.gptq import GPTQLayer, write_gptq
from fewbits.targets.layers import linear_codes, read_layers, require, write_layers
from fewbits.targets.nbits import LEAVES, OP, WIDTHS, find_nbits, judge_nbits, node_attributes, pack_nbits, unpack_nbits
from fewbits.targets.onnx_graph import DATA_FILE, FILE, nbits_checks, read_onnx, with_accuracy
from fewbits.targets.words import pack_words

CONFIG_FILE = "genai_config.json"
MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
"""``model_type`` of the architectures whose graphs are checked."""
_EXCLUDED = ("/lm_head/MatMul", "/model/embed_tokens/Gather")
_NODE = re.compile(rf"/(?:model/layers\.(\d+)/(attn|mlp)/(\w+)|lm_head)/{OP}")
_QKV = ("q_proj", "k_proj", "v_proj")
_LUT = "mlas.use_lut_gemm"
_TABLES = ("cos_cache", "sin_cache")
_TIMEOUT_S = 6 * 3600


@dataclass(frozen=True)
class GenAI:
    """A folder for onnxruntime-genai.

    Args:
        accuracy_level: of the layers, 0 (fp32 activations) or 4 (int8 activations, the fast kernels).

    Raises:
        ValueError: for another level.

    Example:
        >>> GenAI().judge(Scheme.parse("W2HA16G64"), (32, 128)).reason
        '2-bit codes, zero point 3/2, blocks of 64'
    """

    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.accuracy_level not in (0, 4):
            raise ValueError(f"accuracy_level={self.accuracy_level} is unknown; use 0 (fp32) or 4 (int8 activations)")

    @property
    def name(self) -> str:
        """``genai``."""
        return "genai"

    def _find(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[Fit, int] | str:
        found = find_nbits(scheme, shape, padded=False)
        if isinstance(found, str):
            return found
        carrier = _carrier_fit(scheme)
        if carrier is None:
            return explain_misfit(scheme.grid, WIDTHS, ("middle",))
        if shape[0] * carrier.num_bits % 32:
            return f"out_features={shape[0]}: GPTQ, from which the builder imports, needs a multiple of 32"
        return found

    def judge(self, scheme: Scheme, shape: tuple[int, int]) -> Judgement:
        """Verdict and reason; :meth:`holds` is its refusal."""
        return judge_nbits(self._find(scheme, shape))

    def holds(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """None, or why the format cannot hold the scheme."""
        found = self._find(scheme, shape)
        return found if isinstance(found, str) else None

    def write(self, model: Any, tokenizer: Any | None, folder: Path) -> None:
        """Graph, ``genai_config.json`` and tokenizer.

        Raises:
            ValueError: without a tokenizer; for an architecture, a layer that is not quantized, or a grid that the
                engine does not hold; if the builder fails.
            ImportError: without onnx and onnxruntime-genai.
        """
        onnx = require("onnx", "onnx")
        require("onnxruntime_genai", "genai")
        codes = linear_codes(model, self.name)
        _refuse_model(model, codes, tokenizer)
        plans: dict[str, tuple[Fit, int]] = {}
        carriers: dict[str, GPTQLayer] = {}
        for name, q in codes.items():
            found, carrier = self._find(q.scheme, (q.shape[0], q.shape[1])), _carrier_fit(q.scheme)
            if isinstance(found, str) or carrier is None:
                raise ValueError(f"{name}: {found}")
            plans[name] = found
            ones = torch.ones(q.shape[0], q.shape[1] // found[1], dtype=torch.float16)
            carriers[name] = GPTQLayer(stored_codes(q, carrier).cpu(), ones, carrier.num_bits, found[1])
        source = folder / ".gptq"
        state = {k: v.detach().float().cpu() for k, v in plain_tensors(model).items()}
        write_gptq(model, state, carriers, tokenizer, source)
        _build(source, folder, fuse=_qkv_alike(plans))
        shutil.rmtree(source)
        graph = onnx.load(str(folder / FILE))
        _place_codes(graph, codes, plans, carriers, self.accuracy_level)
        (folder / DATA_FILE).unlink(missing_ok=True)
        onnx.save_model(graph, str(folder / FILE), save_as_external_data=True, location=DATA_FILE, size_threshold=0)
        if any(fit.zeros == "float" for fit, _ in plans.values()):
            config = read_json_object(folder / CONFIG_FILE)
            config["model"]["decoder"]["session_options"][_LUT] = "1"  # else a zero of 1.5 has no fast kernel
            write_json(folder / CONFIG_FILE, config)
        write_layers(folder, codes)

    def read_codes(self, folder: Path) -> dict[str, QTensor]:
        """Codes and scales, checked against the nodes that use them."""
        model, tensors = read_onnx(folder)
        layers = read_layers(folder)
        found: dict[str, QTensor] = {}
        for node, prefix, names in _nodes(model):
            for name in names:
                if name not in layers or name in found:
                    raise ValueError(f"{folder / FILE} has the quantized layer {name} twice, or it is not described")
            try:
                found |= unpack_nbits(prefix, node, tensors, [(n, *layers[n]) for n in names], padded=False)
            except ValueError as error:
                raise ValueError(f"{', '.join(names)}: {error}") from None
        if missing := sorted(set(layers) - set(found)):
            raise ValueError(f"{missing[0]}: {FILE} has no {OP} for it")
        return found

    def read_tensors(self, folder: Path) -> dict[str, Tensor]:
        """Norms, embeddings, biases and whatever was not quantized, in fp32, under the names of the model."""
        model, tensors = read_onnx(folder)
        layers = read_layers(folder)
        packed = {f"{prefix}.{leaf}" for _, prefix, _ in _nodes(model) for leaf in LEAVES}
        found: dict[str, Tensor] = {}
        for key, value in tensors.items():
            if key not in packed and key not in _TABLES:
                found |= _parameters(key, value, layers)
        if "model.embed_tokens.weight" not in found and "lm_head.weight" in found:  # tied: the builder keeps the head
            found["model.embed_tokens.weight"] = found.pop("lm_head.weight")
        return found

    def expected_tensors(self, model: Any) -> dict[str, Tensor]:
        """The same from the model; norms of Gemma plus 1."""
        expected = {k: v.detach().float() for k, v in plain_tensors(model).items()}
        if model.config.model_type == "gemma":
            expected |= {k: 1.0 + v for k, v in expected.items() if k.endswith("norm.weight")}
        return expected

    def load(self, folder: Path, like: Any) -> None:
        """None: the graph runs in onnxruntime-genai; see :meth:`engine_logits`."""

    def engine_logits(self, folder: Path, ids: Tensor, *, accuracy_level: int = 0) -> Tensor:
        """Logits of onnxruntime-genai on the CPU, fp32 ``(sequences, length, vocabulary)``.

        Args:
            folder: the export.
            ids: int ``(sequences, length)``.
            accuracy_level: put in place of the file's: 0 computes in fp32, 4 lets kernels round activations to 8 bits.

        Raises:
            ImportError: without onnxruntime-genai.
        """
        rows = []
        with with_accuracy(folder, accuracy_level) as path:
            for generator in _generators(folder, path, ids, ids.shape[1] + 1, exact=accuracy_level == 0):
                rows.append(torch.from_numpy(np.array(generator.get_output("logits"))))
        return torch.cat(rows)

    def engine_generate(self, folder: Path, ids: Tensor, num_tokens: int, *, accuracy_level: int = 0) -> Tensor:
        """The prompt and ``num_tokens`` greedy tokens after it, int64 ``(sequences, length + num_tokens)``.

        A sequence that ends sooner is padded with -1.

        Raises:
            ImportError: without onnxruntime-genai.
        """
        length = ids.shape[1] + num_tokens
        rows = torch.full((len(ids), length), -1)
        with with_accuracy(folder, accuracy_level) as path:
            generators = _generators(folder, path, ids, length, exact=accuracy_level == 0)
            for row, generator in zip(rows, generators, strict=True):
                while not generator.is_done():
                    generator.generate_next_token()
                sequence = torch.tensor([int(token) for token in generator.get_sequence(0)])
                row[: len(sequence)] = sequence
        return rows

    def engine_checks(self, folder: Path) -> tuple[EngineCheck, ...]:
        """onnxruntime-genai with fp32 activations, and with int8 ones where the file asks for them."""
        return nbits_checks(folder, with_version("onnxruntime-genai"), self.engine_logits)

    def reference(self, model: Any) -> nn.Module:
        """The trained model itself, or (of a model in bf16) the model of its dequantized weights in fp32."""
        return reference_fp32(model)


def _carrier_fit(scheme: Scheme) -> Fit | None:
    """The codes by which the builder learns of a layer: those of GPTQ, which has no zero but the middle."""
    return affine_fit(scheme.grid, WIDTHS)


def _refuse_model(model: Any, codes: dict[str, QTensor], tokenizer: Any | None) -> None:
    config = model.config
    if tokenizer is None:
        raise ValueError("a folder for onnxruntime-genai needs the tokenizer; pass it")
    if config.model_type not in MODELS:
        raise ValueError(f"target 'genai' knows the models {', '.join(MODELS)}; this one is {config.model_type!r}")
    kinds = getattr(config, "layer_types", None) or ()
    windowed = config.model_type == "mistral" and getattr(config, "sliding_window", None)
    if windowed or "sliding_attention" in kinds:
        raise ValueError("the model attends to a sliding window, and onnxruntime-genai computes another one")
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    if rest := sorted(linear - set(codes)):
        raise ValueError(f"the builder imports models whose linear layers are all quantized; {rest[0]} is not")


def _qkv_alike(plans: dict[str, tuple[Fit, int]]) -> bool:
    """Whether query, key and value of every layer can be rows of one matrix."""
    kinds: dict[str, set[Any]] = {}
    for name, (fit, block) in plans.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in _QKV:
            kinds.setdefault(parent, set()).add((fit.num_bits, fit.zeros, block))
    return all(len(found) == 1 for found in kinds.values())


def _build(source: Path, folder: Path, *, fuse: bool) -> None:
    """Run the builder in a process of its own: it changes where Python looks for modules."""
    cache = source / "cache"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(cache), "--extra_options"]
    command += [f"nodes_to_exclude={','.join(_EXCLUDED)}", f"fuse_qkv={str(fuse).lower()}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment, check=False)
    if run.returncode or not (folder / FILE).is_file():
        lines = (run.stderr or run.stdout).strip().splitlines() or [f"exit status {run.returncode}"]
        raise ValueError(f"the builder of onnxruntime-genai failed: {lines[-1][:600]}")


def _nodes(model: Any) -> Iterator[tuple[Any, str, list[str]]]:
    """Every ``MatMulNBits`` with the prefix of its tensors and the layers that it stands for.

    Raises:
        ValueError: for one of another name.
    """
    for node in model.graph.node:
        if node.op_type != OP:
            continue
        match = _NODE.fullmatch(node.name)
        if match is None:
            raise ValueError(f"the node {node.name!r} stands for no known layer")
        prefix = node.name[1:].removesuffix(f"/{OP}").replace("/", ".")
        number, part, leaf = match.groups()
        if number is None:
            yield node, prefix, ["lm_head"]
        else:
            parent = f"model.layers.{number}.{'self_attn' if part == 'attn' else part}"
            yield node, prefix, [f"{parent}.{one}" for one in (_QKV if leaf == "qkv_proj" else (leaf,))]


def _place_codes(
    model: Any,
    codes: dict[str, QTensor],
    plans: dict[str, tuple[Fit, int]],
    carriers: dict[str, GPTQLayer],
    accuracy_level: int,
) -> None:
    """Check that the builder kept the codes that it was given, and put the exact tensors in their place."""
    onnx = require("onnx", "onnx")
    tensors = {t.name: t for t in model.graph.initializer}
    placed: set[str] = set()
    for node, prefix, names in _nodes(model):
        given = torch.cat([pack_words(carriers[n].stored, carriers[n].num_bits) for n in names]).view(torch.uint8)
        kept = onnx.numpy_helper.to_array(tensors[node.input[1]])
        if kept.tobytes() != given.numpy().tobytes():
            raise ValueError(f"the builder of onnxruntime-genai changed the codes of {', '.join(names)}")
        parts = [pack_nbits(name, codes[name], *plans[name]) for name in names]
        for old in node.input[1:]:
            model.graph.initializer.remove(tensors[old])
        leaves = [leaf for leaf in LEAVES if leaf in parts[0]]
        for leaf in leaves:
            value = torch.cat([part[leaf] for part in parts]).cpu().numpy()
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, f"{prefix}.{leaf}"))
        del node.input[1:]
        node.input.extend(f"{prefix}.{leaf}" for leaf in leaves)
        fit, block = plans[names[0]]
        rows, width = sum(codes[name].shape[0] for name in names), codes[names[0]].shape[1]
        del node.attribute[:]
        said = node_attributes(rows, width, fit, block) | {"accuracy_level": accuracy_level}
        node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in said.items())
        placed |= set(names)
    if missing := sorted(set(codes) - placed):
        raise ValueError(f"the builder of onnxruntime-genai made no {OP} of {missing[0]}")


def _parameters(key: str, value: Tensor, layers: Packed) -> dict[str, Tensor]:
    """The parameters of the model that a tensor of the builder's holds."""
    key = re.sub(r"^model\.layers\.\d+\.final_norm_layernorm\.", "model.norm.", key)
    key = re.sub(r"\.attn\.([qk]_norm)\.layernorm\.", r".self_attn.\1.", key)
    if key == "lm_head.MatMul.weight":
        return {"lm_head.weight": value.t().contiguous()}
    match = re.fullmatch(r"(model\.layers\.\d+)\.(attn|mlp)\.(\w+)\.Add\.bias", key)
    if match is None:
        return {key: value}
    parent = f"{match[1]}.{'self_attn' if match[2] == 'attn' else match[2]}"
    names = [f"{parent}.{leaf}" for leaf in (_QKV if match[3] == "qkv_proj" else (match[3],))]
    rows = [layers[name][1][0] if name in layers else 0 for name in names]
    if sum(rows) != len(value):
        raise ValueError(f"{key} has {len(value)} rows; {', '.join(names)} have {sum(rows)}")
    return {f"{name}.bias": part for name, part in zip(names, value.split(rows), strict=True)}


def _generators(folder: Path, path: Path, ids: Tensor, length: int, *, exact: bool) -> Iterator[Any]:
    """A generator for each sequence, its prompt taken in, on a copy of the folder with another graph.

    ``exact`` leaves out the table kernel, which rounds activations to 8 bits whatever the accuracy level says.
    """
    og = require("onnxruntime_genai", "genai")
    config = read_json_object(folder / CONFIG_FILE)
    if exact:
        config["model"]["decoder"]["session_options"].pop(_LUT, None)
    write_json(path.with_name(CONFIG_FILE), config)
    model = og.Model(str(path.parent))
    for row in ids:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(row[None].int().cpu().numpy())
        yield generator
