"""Requantize the linear layers of a GGUF file by the package gguf's own quantizer.

usage: python scripts/gguf_rivals.py SOURCE OUTPUT TYPE        (TYPE is Q4_0, Q4_1, Q5_0, Q8_0, ...)

Embeddings, norms, biases and lm_head stay as they are, so a file shows what the format costs the
layers that every recipe quantizes. The rounding is llama.cpp's reference rounding of that type,
without an importance matrix.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_LINEAR = re.compile(r"blk\.\d+\.(attn|ffn)_\w+\.weight")
_OF_THE_FILE = "GGUF."  # what the writer counts by itself
_ARCHITECTURE = "general.architecture"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("type")
    options = parser.parse_args()
    requantize(options.source, options.output, options.type)


def requantize(source: Path, output: Path, name: str) -> None:
    """Write ``output``, a copy of ``source`` whose linear layers are of the type ``name``.

    Raises:
        SystemExit: gguf's Python package cannot quantize to that type.
    """
    try:
        kind = gguf.GGMLQuantizationType[name]
        gguf.quants.quantize(np.zeros((1, 256), np.float32), kind)
    except (KeyError, NotImplementedError):
        raise SystemExit(f"error: gguf has no quantizer for {name}; Q4_0 and Q8_0 do") from None
    rewrite(source, output, lambda tensor: _converted(tensor, kind))


def rewrite(
    source: Path,
    output: Path,
    convert: Callable[[Any], tuple[Any, Any] | None],
    values: Mapping[str, Any] | None = None,
) -> None:
    """Write ``output``, a copy of ``source`` with other tensors.

    Args:
        source: a GGUF file.
        output: where the copy goes.
        convert: gives a tensor's stored rows and their type; None leaves it out.
        values: metadata with another value than in the source, by key.
    """
    reader = gguf.GGUFReader(source)
    part = output.with_name(f"{output.name}.part")
    architecture = reader.fields[_ARCHITECTURE].contents()
    # What is converted waits in a file: as floats it may not fit in memory.
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


def bits_per_weight(name: str) -> float:
    """Bits of a type, scales included."""
    weights, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return float(8 * size_bytes / weights)


def is_linear(tensor: Any) -> bool:
    """Whether a tensor of a file is the weight of a linear layer of the decoder's layers."""
    return len(tensor.shape) == 2 and bool(_LINEAR.fullmatch(tensor.name))


def _converted(tensor: Any, kind: gguf.GGMLQuantizationType) -> tuple[Any, Any]:
    """A tensor's stored rows and their type."""
    if not is_linear(tensor):
        return tensor.data, tensor.tensor_type
    rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return gguf.quants.quantize(rows, kind), kind


if __name__ == "__main__":
    main()
