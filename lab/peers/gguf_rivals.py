"""Quantizes a model by llama.cpp, all formats from one float file of the same weights.

A rival is named by its format, or by the format and ``+imatrix``. With ``+imatrix``, llama-imatrix
reads the text that calibrates our own INT4, in the same length, and llama-quantize weighs errors by
the result. Mixtures of types are llama.cpp's own. If a row is no multiple of 256 weights, as in
most of SmolLM2 and of the 0.5B, it takes another type than the format's name says. Token table and
lm_head have types of their own. So bits are counted in the file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

from edge.text.chat_template import ChatTemplate
from edge.text.tokenizer import Tokenizer
from export.sources.documents import BUILT_IN_TOKENS, calibration_batches, read_calibration_text
from export.sources.gguf_source import GgufCheckpoint
from export.sources.lora import LoraCheckpoint
from export.sources.opening import open_checkpoint

FORMATS = ("Q4_0", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q8_0")
WITH_MATRIX = "+imatrix"
RIVALS = (*FORMATS, *(name + WITH_MATRIX for name in FORMATS if name != "Q8_0"))
"""Rivals; llama-quantize rounds to Q8_0 without looking at a matrix."""
_OF_THE_FILE = "GGUF."  # keys that the writer counts itself
_ARCHITECTURE, _FILE_TYPE = "general.architecture", "general.file_type"
_LINEAR = re.compile(r"blk\.\d+\.(attn|ffn)_\w+\.weight")
_GRID_WEIGHTS, _GRID_STEPS = 32, 15  # of Q4_1 and Q4_K: one scale and one offset for 32 weights


class FileBits(NamedTuple):
    """Stored bits per weight, scales included, and how many tensors have which type.

    Attributes:
        layers: bits in the linear layers of the decoder's layers.
        with_lm_head: bits with the lm_head, which is the token table if the file has no other.
        types: number of tensors by the name of their type, linear layers only.
    """

    layers: float
    with_lm_head: float
    types: dict[str, int]


def write_floats(source: Path, output: Path, adapter: Path | None = None) -> float | None:
    """Write ``output``, a copy of a GGUF file with all matrices as fp16.

    Args:
        source: the file, quantized or not.
        output: path of the copy.
        adapter: a LoRA of the model to merge; None merges nothing.

    Returns:
        With an adapter, how far it moves the linear layers' weights: root mean square over all,
        in steps of the source's grid of 4 bits (one scale and one offset for 32 weights). A random
        weight between two points of a grid is 0.29 of a step from the nearer one (root mean
        square).
    """
    moved = _Moved()
    with open_checkpoint(str(source)) as base:
        merged = None if adapter is None else LoraCheckpoint(base, adapter)
        if not isinstance(base, GgufCheckpoint):
            raise SystemExit(f"error: llama.cpp's formats are made from a GGUF file, not {source}")
        places = {name: hf for hf, name in base._gguf_names.items()}
        heads = {
            "q_proj": base.spec.attentions()[0].heads,
            "k_proj": base.spec.attentions()[0].kv_heads,
        }

        def convert(tensor: Any) -> tuple[Any, Any]:
            if len(tensor.shape) < 2:
                return tensor.data, tensor.tensor_type
            rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if merged is not None and is_linear(tensor):
                name = places[tensor.name]
                change = merged.tensor(name) - base.tensor(name).astype(np.float32)
                part = name.split(".")[-2]
                if base.spec.architecture == "llama" and part in heads:
                    change = _paired_rows(change, heads[part])
                moved.add(rows, change)
                rows = rows + change
            return rows.astype(np.float16), gguf.GGMLQuantizationType.F16

        file_type = {_FILE_TYPE: int(gguf.LlamaFileType.MOSTLY_F16)}
        rewrite(source, output, convert, file_type)
    return None if adapter is None else moved.steps


class _Moved:
    """Sums up changes of weights, in steps of the grid that the weights before them span."""

    def __init__(self) -> None:
        self._squares, self._count = 0.0, 0

    def add(self, before: NDArray[np.float32], change: NDArray[np.float32]) -> None:
        groups = before.reshape(-1, _GRID_WEIGHTS)
        step = (groups.max(axis=1) - groups.min(axis=1)) / _GRID_STEPS
        ratio = change.reshape(-1, _GRID_WEIGHTS)[step > 0] / step[step > 0, None]
        self._squares += float(np.square(ratio, dtype=np.float64).sum())
        self._count += ratio.size

    @property
    def steps(self) -> float:
        return float(np.sqrt(self._squares / self._count))


def _paired_rows(weights: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Return HF's rows of q or k in the order that llama.cpp gives them in ``llama``."""
    halves = weights.reshape(num_heads, 2, -1, *weights.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(weights.shape)


def write_calibration_text(source: Path, output: Path) -> int:
    """Write the text that calibrates INT4, as the model reads it; return its number of tokens."""
    with open_checkpoint(str(source)) as checkpoint:
        text = checkpoint.text
    tokenizer = Tokenizer.from_bytes(text.tokenizer_json, text.tokens)
    template = ChatTemplate(text.chat_template, text.tokens) if text.chat_template else None
    documents = read_calibration_text(None, mixed=True)
    ids = calibration_batches(tokenizer, template, documents, BUILT_IN_TOKENS)
    body = ids[:, 1:] if text.tokens.add_bos else ids
    output.write_text(tokenizer.decode(body.reshape(-1).tolist()), encoding="utf-8")
    return int(body.size)


def matrix_command(
    programs: Path, floats: Path, text: Path, output: Path, threads: int
) -> list[object]:
    """Return the command that writes an importance matrix, in windows as long as ours."""
    command = [programs / "llama-imatrix", "-m", floats, "-f", text, "-o", output, "-t", threads]
    return [*command, "-c", 512, "-b", 512, "--parse-special", "--no-ppl"]


def quantize_command(
    programs: Path, floats: Path, output: Path, rival: str, matrix: Path, threads: int
) -> list[object]:
    """Return the command that writes a rival's file; it reads ``matrix`` only for ``+imatrix``."""
    kind, _, with_matrix = rival.partition("+")
    given = ["--imatrix", matrix] if with_matrix else []
    return [programs / "llama-quantize", *given, floats, output, kind, threads]


def file_bits(path: Path) -> FileBits:
    """Count the bits of a file's weights."""
    tensors = gguf.GGUFReader(path).tensors
    layers = [tensor for tensor in tensors if is_linear(tensor)]
    named = {tensor.name: tensor for tensor in tensors}
    head = named.get("output.weight", named.get("token_embd.weight"))
    types = Counter(tensor.tensor_type.name for tensor in layers)
    return FileBits(_bits(layers), _bits([*layers, head]), dict(types.most_common()))


def _bits(tensors: list[Any]) -> float:
    return float(8 * sum(t.n_bytes for t in tensors) / sum(t.n_elements for t in tensors))


def rewrite(
    source: Path,
    output: Path,
    convert: Callable[[Any], tuple[Any, Any] | None],
    values: Mapping[str, Any] | None = None,
) -> None:
    """Write ``output``, a copy of ``source`` with other tensors.

    Args:
        source: a GGUF file.
        output: path of the copy.
        convert: returns a tensor's stored rows and their type; None leaves it out.
        values: metadata whose value differs from the source's, by key.
    """
    reader = gguf.GGUFReader(source)
    part = output.with_name(f"{output.name}.part")
    architecture = reader.fields[_ARCHITECTURE].contents()
    # Converted tensors wait in a file: as floats they may not fit in memory.
    writer = gguf.GGUFWriter(part, architecture, use_temp_file=True)
    for field in reader.fields.values():
        if field.name == _ARCHITECTURE or field.name.startswith(_OF_THE_FILE):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = (values or {}).get(field.name, field.contents())
        writer.add_key_value(field.name, value, field.types[0], inner)
    for tensor in reader.tensors:
        if (converted := convert(tensor)) is not None:
            data, stored = converted
            writer.add_tensor(tensor.name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(output)


def is_linear(tensor: Any) -> bool:
    """Return whether a tensor is the weight of a linear layer of the decoder's layers."""
    return len(tensor.shape) == 2 and bool(_LINEAR.fullmatch(tensor.name))
