"""Reads the tensors of one quantized linear module: header first, then scales, then weights.

The layouts, for a weight ``[out, in]`` of ``b`` bits; words are INT32, elements in them lowest
first unless said, the last word of a row filled up:

====================  ==============================================================================
``gptq``              qweight [in*b/32, out] along in; qzeros [groups, out*b/32]; scales [groups,
                      out]; g_idx [in], the group of each channel
``awq``               qweight [in, out/8] and qzeros [groups, out/8], columns 0 2 4 6 1 3 5 7 of
                      eight in a word; scales [groups, out]
``packed``            weight_packed [out, in*b/32]; weight_scale [out, groups]; weight_zero_point
                      [out*b/32, groups] along out, or (compressed-tensors up to 0.9.4) INT8 [out,
                      groups]; weight_g_idx [in]; weight_shape
``int8``, ``fp8``     weight [out, in]; weight_scale [out, groups], [out, 1] or one;
                      weight_zero_point; input_scale. In blocks weight_scale or, of transformers,
                      (``fp8-inv``) weight_scale_inv [out/block, in/block]
``nvfp4``             weight_packed [out, in/2], two to a byte; weight_scale [out, in/16] in FP8,
                      divided by weight_global_scale
``modelopt-nvfp4``    weight [out, in/2]; weight_scale [out, in/16] in FP8, times weight_scale_2
====================  ==============================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import CheckpointError

from .quantization_config import WeightFormat
from .quantized_weight import QuantizedWeight
from .safetensors_file import TensorEntry

_FLOATS = ("F16", "BF16", "F32")
_FP8 = ("F8_E4M3",)
_WORD_BITS = 32
# Place of column i of eight in a word of AWQ.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])

Get = Callable[[str], NDArray[Any]]


@dataclass(frozen=True)
class _Tensor:
    """Types and shapes that a tensor of a module may have.

    Attributes:
        other: the form that older versions of the tool wrote, told by its type.
    """

    types: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    required: bool = True
    other: _Tensor | None = None

    def of_type(self, dtype: str) -> _Tensor:
        """Return this form, or the other one if that has the type."""
        return self.other if self.other is not None and dtype in self.other.types else self


@dataclass(frozen=True)
class QuantizedModule:
    """A linear module whose weight is quantized.

    Attributes:
        name: e.g. ``model.layers.0.mlp.up_proj``.
        form: how its weight is stored.
        shape: ``(out, in)``.
        field: key and file that state the form, for errors.
        path: the checkpoint, for errors.
    """

    name: str
    form: WeightFormat
    shape: tuple[int, int]
    field: str
    path: Path

    def check(self, entries: Mapping[str, TensorEntry]) -> set[str]:
        """Check types and shapes by the header alone.

        Returns:
            The names of the tensors that belong to the module.

        Raises:
            CheckpointError: a tensor is missing or not as the config says; the message names tensor
                and field.
        """
        (out, width), size = self.shape, self._group_size
        if width % size:
            raise self.error("", f"has {width} inputs, no multiple of its groups of {size}")
        if self.form.layout == "awq" and out % 8:
            raise self.error("qweight", f"is of {out} outputs, no multiple of the 8 of a word")
        found = set()
        for part, wanted in self._tensors().items():
            name = f"{self.name}.{part}"
            entry = entries.get(name)
            if entry is None:
                if wanted.required:
                    raise self.error(part, f"is missing, expected {list(wanted.shapes[0])}")
                continue
            found.add(name)
            wanted = wanted.of_type(entry.dtype)
            if entry.dtype not in wanted.types:
                raise self.error(
                    part, f"has type {entry.dtype}, expected {' or '.join(wanted.types)}"
                )
            if entry.shape not in wanted.shapes:
                shapes = " or ".join(str(list(shape)) for shape in wanted.shapes)
                raise self.error(part, f"has shape {list(entry.shape)}, expected {shapes}")
        return found

    def check_values(self, get: Get, has: Callable[[str], bool]) -> None:
        """Check scales, zero points and channel groups, a small part of the weights' bytes.

        Args:
            get: reads a tensor by its whole name.
            has: whether the file has a tensor.

        Raises:
            CheckpointError: a value makes no sense, or is not as the config says.
        """
        reader = _Values(self, get, has)
        reader.scales()
        if self.form.is_integer:
            reader.zeros()
            reader.group_of()
            reader.input_scale()

    def read(self, get: Get, has: Callable[[str], bool]) -> QuantizedWeight:
        """Read the integers of a module with an integer layout, checked as by `check_values`."""
        reader = _Values(self, get, has)
        codes = _CODES[self.form.layout](reader)
        return QuantizedWeight(
            self.form.bits,
            codes,
            reader.zeros(),
            reader.scales(),
            reader.group_of(),
            reader.input_scale(),
        )

    def read_floats(self, get: Get, has: Callable[[str], bool]) -> NDArray[np.float32]:
        """Read the dequantized weight, float32 ``[out, in]``, checked as by `check_values`."""
        if self.form.is_integer:
            return self.read(get, has).dequantize()
        return _FLOAT_WEIGHTS[self.form.layout](_Values(self, get, has))

    @property
    def _group_size(self) -> int:
        return self.form.group_size or self.shape[1]

    @property
    def num_groups(self) -> int:
        """Number of groups of a row."""
        return self.shape[1] // self._group_size

    def error(self, part: str, problem: str) -> CheckpointError:
        """Make an error that names a tensor of the module, or the module if ``part`` is empty."""
        tensor = f"tensor {self.name}.{part}" if part else f"module {self.name}"
        return CheckpointError(
            f"{self.path}: {tensor} {problem}; {self.field} says {self.form}. The "
            "checkpoint is damaged, or its config is of another one"
        )

    def _tensors(self) -> dict[str, _Tensor]:
        form, (out, width), groups = self.form, self.shape, self.num_groups
        words = math.ceil(width * form.bits / _WORD_BITS)
        out_words = math.ceil(out * form.bits / _WORD_BITS)
        integers = ("I32",)
        if form.layout == "gptq":
            return {
                "qweight": _Tensor(integers, ((words, out),)),
                "qzeros": _Tensor(integers, ((groups, out_words),)),
                "scales": _Tensor(_FLOATS, ((groups, out),)),
                "g_idx": _Tensor(integers, ((width,),), required=form.act_order),
            }
        if form.layout == "awq":
            return {
                "qweight": _Tensor(integers, ((width, out // 8),)),
                "qzeros": _Tensor(integers, ((groups, out // 8),)),
                "scales": _Tensor(_FLOATS, ((groups, out),)),
            }
        per_row = ((out, groups), (1,), ()) if groups == 1 else ((out, groups),)
        inputs = {
            "input_scale": _Tensor(_FLOATS, ((1,), ()), required=form.inputs == "static"),
            "input_zero_point": _Tensor(("I8", "I32"), ((1,), ()), required=False),
        }
        if form.layout == "packed":
            return {
                "weight_packed": _Tensor(integers, ((out, words),)),
                "weight_scale": _Tensor(_FLOATS, per_row),
                "weight_zero_point": _Tensor(
                    integers,
                    ((out_words, groups),),
                    required=not form.symmetric,
                    other=_Tensor(("I8",), per_row),
                ),
                "weight_g_idx": _Tensor(integers, ((width,),), required=form.act_order),
                "weight_shape": _Tensor(("I64", "I32"), ((2,),), required=False),
                **inputs,
            }
        if form.layout == "int8":
            return {
                "weight": _Tensor(("I8",), (self.shape,)),
                "weight_scale": _Tensor(_FLOATS, per_row),
                "weight_zero_point": _Tensor(("I8",), per_row, required=not form.symmetric),
                **inputs,
            }
        if form.layout in ("fp8", "fp8-inv"):
            scale = "weight_scale" if form.layout == "fp8" else "weight_scale_inv"
            shapes: tuple[tuple[int, ...], ...] = ((out, 1), (1,), ())
            if form.block is not None:
                shapes = ((math.ceil(out / form.block[0]), math.ceil(width / form.block[1])),)
            return {
                "weight": _Tensor(_FP8, (self.shape,)),
                scale: _Tensor(_FLOATS, shapes),
                **inputs,
            }
        half, one = (out, width // 2), ((1,), ())
        packed, factor, of_inputs = "weight_packed", "weight_global_scale", "input_global_scale"
        if form.layout == "modelopt-nvfp4":
            packed, factor, of_inputs = "weight", "weight_scale_2", "input_scale"
        return {
            packed: _Tensor(("U8",), (half,)),
            "weight_scale": _Tensor(_FP8, ((out, width // 16),)),
            factor: _Tensor(("F32",), one),
            of_inputs: _Tensor(("F32",), one, required=False),
        }


class _Values:
    """The tensors of a module as numbers, each checked."""

    def __init__(self, module: QuantizedModule, get: Get, has: Callable[[str], bool]) -> None:
        self.module = module
        self.form = module.form
        self.out, self.width = module.shape
        self._get, self._has = get, has

    def get(self, part: str) -> NDArray[Any]:
        return self._get(f"{self.module.name}.{part}")

    def has(self, part: str) -> bool:
        return self._has(f"{self.module.name}.{part}")

    def error(self, part: str, problem: str) -> CheckpointError:
        return self.module.error(part, problem)

    def floats(self, part: str) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.get(part).astype(np.float32)
        if not np.isfinite(values).all():
            raise self.error(part, "holds NaN or infinite scales")
        return values

    def scales(self) -> NDArray[np.float32]:
        """Read scales ``[out, groups]``; those of float layouts stay as they are stored."""
        layout = self.form.layout
        if layout in ("gptq", "awq"):
            return np.ascontiguousarray(self.floats("scales").T)
        if layout in ("nvfp4", "modelopt-nvfp4"):
            factor = "weight_global_scale" if layout == "nvfp4" else "weight_scale_2"
            if not (self.floats(factor) > 0).all():
                raise self.error(factor, "is not positive")
            return self.floats("weight_scale")
        part = "weight_scale_inv" if layout == "fp8-inv" else "weight_scale"
        scales = self.floats(part)
        if self.form.block is not None:
            return scales
        groups = self.module.num_groups
        return np.ascontiguousarray(np.broadcast_to(scales.reshape(-1, groups), (self.out, groups)))

    def zeros(self) -> NDArray[np.int16]:
        """Read zero points ``[out, groups]``, minus half the range."""
        half = 1 << (self.form.bits - 1)
        part = "qzeros"
        if self.form.layout == "gptq":
            # The tools subtract from whole words, so a zero point of 0 borrows from the next.
            ones = _every_element(self.form.bits) * self.form.zero_offset & 0xFFFFFFFF
            words = self.get(part).view(np.uint32) + np.uint32(ones)
            zeros = unpack(words, self.form.bits).T[: self.out].astype(np.int16) - half
        elif self.form.layout == "awq":
            zeros = _unpack_awq(self.get(part)).T.astype(np.int16) - half
        else:
            part = "weight_zero_point"
            shape = (self.out, self.module.num_groups)
            if not self.has(part):
                return np.zeros(shape, dtype=np.int16)
            stored = self.get(part)
            if self.form.layout == "packed" and stored.dtype != np.int8:
                rows = np.ascontiguousarray(stored.T)
                zeros = unpack(rows, self.form.bits).T[: self.out].astype(np.int16) - half
            else:
                zeros = np.broadcast_to(stored.reshape(-1, shape[1]), shape).astype(np.int16)
        if self.form.symmetric and zeros.any():
            raise self.error(part, f"holds zero points other than {half}")
        return np.ascontiguousarray(zeros)

    def group_of(self) -> NDArray[np.int64] | None:
        part = "g_idx" if self.form.layout == "gptq" else "weight_g_idx"
        if self.form.layout not in ("gptq", "packed") or not self.has(part):
            return None
        groups = self.module.num_groups
        found = self.get(part).astype(np.int64)
        if self.form.layout == "packed" and (found == -1).all():
            return None  # compressed-tensors' mark for the plain order
        if found.min() < 0 or found.max() >= groups:
            raise self.error(
                part, f"names groups {found.min()} to {found.max()}, expected 0 to {groups - 1}"
            )
        plain = np.arange(self.width) // (self.width // groups)
        if np.array_equal(found, plain):
            return None
        if not self.form.act_order:
            raise self.error(part, "does not follow the order of the channels")
        return found

    def input_scale(self) -> float | None:
        """Read the scale of a symmetric static range of the inputs."""
        if self.form.inputs != "static" or not self.form.inputs_symmetric:
            return None
        scale = float(self.floats("input_scale").reshape(-1)[0])
        if not scale > 0:
            raise self.error("input_scale", f"is {scale:g}, expected a positive number")
        if self.has("input_zero_point") and self.get("input_zero_point").any():
            raise self.error("input_zero_point", "is not 0")
        return scale

    def check_shape(self) -> None:
        if self.has("weight_shape"):
            found = tuple(self.get("weight_shape").tolist())
            if found != (self.out, self.width):
                raise self.error(
                    "weight_shape", f"holds {list(found)}, expected {[self.out, self.width]}"
                )


def unpack(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Unpack 32-bit words, lowest bits first.

    Args:
        words: int32 or uint32 ``[rows, words]``.
        bits: bits of an element: 2, 4 or 8.

    Returns:
        uint8 ``[rows, words * 32 / bits]``.
    """
    bytes_ = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    if bits == 8:
        return bytes_
    per_byte = 8 // bits
    result = np.empty((*bytes_.shape, per_byte), dtype=np.uint8)
    for place in range(per_byte):
        result[..., place] = bytes_ >> (place * bits) & ((1 << bits) - 1)
    return result.reshape(len(bytes_), -1)


def _every_element(bits: int) -> int:
    """Return a word that holds 1 in every element."""
    return sum(1 << shift for shift in range(0, _WORD_BITS, bits))


def _unpack_awq(words: NDArray[Any]) -> NDArray[np.uint8]:
    nibbles = unpack(words, 4)
    return nibbles.reshape(len(nibbles), -1, 8)[..., _AWQ_PLACES].reshape(len(nibbles), -1)


def _signed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Subtract half the range; bytes wrap around as two's complement does."""
    return np.ascontiguousarray(codes - np.uint8(1 << (bits - 1))).view(np.int8)


def _gptq_codes(values: _Values) -> NDArray[np.int8]:
    codes = unpack(values.get("qweight").T, values.form.bits)[:, : values.width]
    return _signed(codes, values.form.bits)


def _awq_codes(values: _Values) -> NDArray[np.int8]:
    return _signed(_unpack_awq(values.get("qweight")).T, 4)


def _packed_codes(values: _Values) -> NDArray[np.int8]:
    values.check_shape()
    codes = unpack(values.get("weight_packed"), values.form.bits)[:, : values.width]
    return _signed(codes, values.form.bits)


def _int8_codes(values: _Values) -> NDArray[np.int8]:
    return values.get("weight")


_CODES: dict[str, Callable[[_Values], NDArray[np.int8]]] = {
    "gptq": _gptq_codes,
    "awq": _awq_codes,
    "packed": _packed_codes,
    "int8": _int8_codes,
}


def _fp8_weight(values: _Values) -> NDArray[np.float32]:
    weight: NDArray[np.float32] = values.get("weight").astype(np.float32)
    scales = values.scales()
    if values.form.block is None:
        weight *= scales
        return weight
    height, width = values.form.block
    for row, of_row in enumerate(scales):
        rows = weight[row * height : (row + 1) * height]
        rows *= np.repeat(of_row, width)[: values.width]
    return weight


def _fp4_weight(values: _Values, packed: str, scales: NDArray[np.float32]) -> NDArray[np.float32]:
    stored = values.get(packed)
    weight = np.empty((values.out, values.width), dtype=np.float32)
    weight[:, 0::2] = _FP4[stored & 15]
    weight[:, 1::2] = _FP4[stored >> 4]
    groups = weight.reshape(values.out, -1, 16)
    groups *= scales[..., None]
    return weight


def _nvfp4_weight(values: _Values) -> NDArray[np.float32]:
    scales = values.scales() / values.floats("weight_global_scale")
    return _fp4_weight(values, "weight_packed", scales)


def _modelopt_nvfp4_weight(values: _Values) -> NDArray[np.float32]:
    return _fp4_weight(values, "weight", values.scales() * values.floats("weight_scale_2"))


_FLOAT_WEIGHTS: dict[str, Callable[[_Values], NDArray[np.float32]]] = {
    "fp8": _fp8_weight,
    "fp8-inv": _fp8_weight,
    "nvfp4": _nvfp4_weight,
    "modelopt-nvfp4": _modelopt_nvfp4_weight,
}
