"""Reads how a checkpoint's weights are quantized: ``quantization_config`` of config.json.

Every tool writes keys of its own. They are brought into one form, a `WeightFormat` for each module,
and a setting that cannot be followed exactly is refused by name. The layouts were read off tools'
own files (``tools/goldens/quantized.py``): those of GPTQ and AWQ as GPTQModel 7.6 and
AutoRound 0.15 write them, compressed-tensors 0.19 and ModelOpt 0.47. Names of older versions are
from the source of AutoRound 0.3 to 0.6 and of compressed-tensors 0.5. ``fp8`` is described by
transformers' ``FineGrainedFP8Config``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from edge.bundle.manifest import SourceQuantization
from edge.errors import CheckpointError

from .checkpoint_text import read_json
from .untrusted_pattern import match

KEYS = ("quantization_config", "compression_config")
MODELOPT_NAME = "hf_quant_config.json"
"""File in which ModelOpt says it; its newer versions copy it into config.json."""
AUTOGPTQ_NAME = "quantize_config.json"
"""File in which AutoGPTQ says it; up to 0.6 it is the only place."""
Layout = Literal["gptq", "awq", "packed", "int8", "fp8", "fp8-inv", "nvfp4", "modelopt-nvfp4"]
Inputs = Literal["float", "static", "per-token", "dynamic"]

_INSTEAD = "export the original model and choose a --quant"
_TRANSFORMS = f"asks for transforms at run time, which are not read; {_INSTEAD}"
_NO_GRID = f"its weights are no multiples of a scale, so no integers can be kept; {_INSTEAD}"
# Other methods that `transformers` knows, and why they are not read.
_REFUSED = {
    "bitsandbytes": f"NF4, FP4 and LLM.int8 are not read: {_NO_GRID}; or dequantize it where it "
    "was made: model.dequantize() and save_pretrained()",
    "aqlm": _NO_GRID,
    "quip": _NO_GRID,
    "vptq": _NO_GRID,
    "higgs": _NO_GRID,
    "spqr": _NO_GRID,
    "hqq": f"the layout is not read; {_INSTEAD}",
    "eetq": f"the layout is not read; {_INSTEAD}",
    "quanto": f"the layout is not read; {_INSTEAD}",
    "torchao": f"the layout is not read; {_INSTEAD}",
    "fbgemm-fp8": f"the layout is not read; {_INSTEAD}",
    "bitnet": f"the layout is not read; {_INSTEAD}",
    "mxfp4": f"the layout is not read; {_INSTEAD}",
}


@dataclass(frozen=True)
class WeightFormat:
    """How the weight of one linear module is stored.

    Attributes:
        layout: the tensors that there are, as listed in `export.sources.quantized_module`.
        bits: bits of a weight.
        group_size: weights along the input that share a scale; 0 is the whole row.
        symmetric: whether the integers have no zero point.
        zero_offset: number to add to a stored zero point; 1 for GPTQ's first format.
        act_order: whether the input channels are grouped by importance, not by position.
        block: ``[out, in]`` of a block that shares a scale (``fp8``), or None.
        inputs: how the tool rounds the module's inputs, too: not at all, by a stored scale, to INT8
            by each token's largest (``per-token``), or in another way at run time.
        inputs_symmetric: whether rounded inputs have no zero point.
    """

    layout: Layout
    bits: int
    group_size: int = 0
    symmetric: bool = True
    zero_offset: int = 0
    act_order: bool = False
    block: tuple[int, int] | None = None
    inputs: Inputs = "float"
    inputs_symmetric: bool = True

    @property
    def is_integer(self) -> bool:
        """Return whether the weights are integers times scales."""
        return self.layout in ("gptq", "awq", "packed", "int8")

    def __str__(self) -> str:
        if not self.is_integer:
            scales = f" in blocks of {self.block[0]} x {self.block[1]}" if self.block else ""
            return f"{'NVFP4' if self.bits == 4 else 'FP8'} weights{scales}{self._inputs}"
        size = f"groups of {self.group_size}" if self.group_size else "one scale per output"
        zero = "symmetric" if self.symmetric else "asymmetric"
        order = ", act-order" if self.act_order else ""
        return f"{self.bits} bits, {size}, {zero}{order}{self._inputs}"

    @property
    def _inputs(self) -> str:
        return "" if self.inputs == "float" else f", {self.inputs} scales of inputs"


@dataclass(frozen=True)
class QuantizationConfig:
    """The quantization of a checkpoint's weights, as its config states it.

    Attributes:
        key: the key that states it; empty for a file of its own.
        method: ``quant_method``.
        where: the file that states it.
        main: the format of most modules.
        cache_scales: whether the checkpoint has scales for an 8-bit KV cache, which are not used.
    """

    key: str
    method: str
    where: Path
    main: WeightFormat
    resolve: Callable[[str], WeightFormat | None]
    cache_scales: bool = False

    def format_of(self, module: str) -> WeightFormat | None:
        """Return the format of a linear module, e.g. ``lm_head``; None if it is left float."""
        return self.resolve(module)

    @property
    def place(self) -> str:
        """Key and file, for errors."""
        return f"{self.key} in {self.where.name}" if self.key else self.where.name

    def describe(self) -> SourceQuantization:
        """Describe it for the manifest."""
        cache = "; scales of an 8-bit KV cache are left out" if self.cache_scales else ""
        return SourceQuantization(method=self.method, details=f"{self.main}{cache}")


def read_quantization(config: Mapping[str, Any], directory: Path) -> QuantizationConfig | None:
    """Read how a checkpoint is quantized; None if its config does not say.

    Args:
        config: the parsed config.json.
        directory: the checkpoint; may hold `MODELOPT_NAME`.

    Raises:
        CheckpointError: an unknown method, or a value that cannot be followed; the message names
            the key.
    """
    where = directory / "config.json"
    found = [key for key in KEYS if config.get(key) is not None]
    key, section = KEYS[0], None
    if found:
        key, section = found[0], config[found[0]]
    elif (directory / MODELOPT_NAME).is_file():
        where, key = directory / MODELOPT_NAME, "quantization"
        section = read_json(where).get(key)
        if isinstance(section, dict):
            section = {"quant_method": "modelopt", **section}
    elif (directory / AUTOGPTQ_NAME).is_file():
        where, key = directory / AUTOGPTQ_NAME, ""  # the whole file
        section = {"quant_method": "gptq", **read_json(where)}
    if section is None:
        return None
    if not isinstance(section, dict):
        raise CheckpointError(f"{where}: {key} must be an object, found {section!r:.80}")
    default = "compressed-tensors" if "config_groups" in section else None
    method = section.get("quant_method", default)
    reader = _Reader(section, f"{where}: {key}" if key else str(where))
    if method is None and {"bits", "group_size"} <= section.keys():
        raise reader.error("quant_method", f"is missing, as MLX writes it: not read; {_INSTEAD}")
    if not isinstance(method, str):
        raise reader.error("quant_method", f"must name a method, found {method!r:.80}")
    name = method.lower().replace("_", "-").removeprefix("intel/")
    if name in _REFUSED:
        raise reader.error("quant_method", f"is {method}: {_REFUSED[name]}")
    if name not in _METHODS:
        raise reader.error(
            "quant_method", f"{method!r:.80} is not known; known: {', '.join(_METHODS)}"
        )
    for rotated in ("rotation", "rotation_config", "spinquant_config"):  # GPTQModel, AutoRound
        if section.get(rotated):
            raise reader.error(rotated, _TRANSFORMS)
    main, resolve, cache_scales = _METHODS[name](reader)
    return QuantizationConfig(key, name, where, main, resolve, cache_scales)


_Resolve = Callable[[str], "WeightFormat | None"]
_Test = Callable[[str], bool]
# A pattern of literal characters only, so the match never backtracks.
_PLAIN = re.compile(r"(?:[\w.-]|\\[.-])*(?:\\Z)?")
_Found = tuple[WeightFormat, _Resolve, bool]
_T = TypeVar("_T")


class _Reader:
    """One JSON object; every error names the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} {problem}")

    def convert(self, kind: type[_T]) -> _T:
        """Check the types of the keys that a struct has; tools add other keys."""
        try:
            return msgspec.convert(dict(self.values), kind)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:
            raise CheckpointError(f"{self.where}: {error}") from error

    def group_size(self, size: int | None, key: str = "group_size") -> int:
        """Return a group size as in `WeightFormat`; tools write -1 for a whole row."""
        if size is None or size == -1:
            return 0
        if size < 1:
            raise self.error(key, f"must be positive or -1, found {size}")
        return size

    def only(self, key: str, value: Any, known: Sequence[Any]) -> None:
        if value not in known:
            choices = ", ".join(map(str, known))
            raise self.error(key, f"is {value!r:.80}; what is read: {choices}. Else {_INSTEAD}")

    def patterns(self, key: str, patterns: Sequence[str]) -> list[_Test]:
        """Make a test per pattern: whether it matches the beginning of a module's name."""
        return [self._pattern(key, pattern) for pattern in patterns]

    def _pattern(self, key: str, pattern: str) -> _Test:
        def test(module: str) -> bool:
            try:
                return match(pattern, module) is not None
            except CheckpointError as error:
                raise self.error(key, f"holds a pattern that is not valid: {error}") from error

        if _PLAIN.fullmatch(pattern):  # AutoRound names each module, and the child takes 0.1 ms
            return lambda module: re.match(pattern, module) is not None
        test("")
        return test

    def names(self, key: str, targets: Sequence[str]) -> _Test:
        """Make a test: do compressed-tensors' targets, e.g. ``re:.*q_proj``, have a module?"""
        tests = self.patterns(key, [name[3:] for name in targets if name.startswith("re:")])
        known = set(targets)
        return lambda module: (
            not known.isdisjoint((module, "Linear")) or any(test(module) for test in tests)
        )


# ------------------------------------------------------------------------------------- AWQ


class _Awq(msgspec.Struct):
    bits: int | None = None
    w_bit: int | None = None
    group_size: int | None = None
    q_group_size: int | None = None
    zero_point: bool = True
    version: str = "gemm"


def _awq(reader: _Reader) -> _Found:
    values = reader.convert(_Awq)
    version = reader.values.get("checkpoint_format") or reader.values.get("format")
    reader.only("version", str(version or values.version).lower(), ("gemm",))
    bits = values.bits if values.bits is not None else values.w_bit
    reader.only("bits", bits, (4,))
    size = values.group_size if values.group_size is not None else values.q_group_size
    main = WeightFormat("awq", 4, reader.group_size(size), symmetric=not values.zero_point)
    return _chosen(reader, main)


# ------------------------------------------------------------------------------------ GPTQ


class _Gptq(msgspec.Struct):
    bits: int
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: str | None = None
    format: str | None = None
    pack_dtype: str = "int32"
    is_marlin_format: bool = False


# GPTQ's first format stores every zero point minus one, its second the zero point itself.
_GPTQ_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_GPTQ_BITS = (2, 4, 8)


def _gptq(reader: _Reader) -> _Found:
    values = reader.convert(_Gptq)
    version = values.checkpoint_format or values.format or "gptq"
    if version.lower() == "gemm":  # GPTQModel writes AWQ under either name
        return _awq(reader)
    reader.only("checkpoint_format", version, tuple(_GPTQ_OFFSETS))
    reader.only("is_marlin_format", values.is_marlin_format, (False,))
    reader.only("pack_dtype", values.pack_dtype, ("int32",))
    reader.only("bits", values.bits, _GPTQ_BITS)
    main = WeightFormat(
        "gptq",
        values.bits,
        reader.group_size(values.group_size),
        symmetric=values.sym,
        zero_offset=_GPTQ_OFFSETS[version],
        act_order=values.desc_act,
    )
    return _chosen(reader, main)


class _Chosen(msgspec.Struct):
    lm_head: bool = False
    dynamic: dict[str, dict[str, Any]] | None = None
    modules_in_block_to_quantize: list[list[str] | str] | None = None
    modules_to_not_convert: list[str] | None = None


def _chosen(reader: _Reader, main: WeightFormat) -> _Found:
    """Read which modules GPTQ and AWQ quantize; GPTQModel has the same rules for both."""
    values = reader.convert(_Chosen)
    dynamic = values.dynamic or {}
    rules = reader.patterns(
        "dynamic", [name.removeprefix("+:").removeprefix("-:") for name in dynamic]
    )
    chosen = [
        name
        for names in values.modules_in_block_to_quantize or ()
        for name in ([names] if isinstance(names, str) else names)
    ]

    def resolve(module: str) -> WeightFormat | None:
        if module == "lm_head" and not values.lm_head:
            return None
        if chosen and module != "lm_head" and not module.endswith(tuple(chosen)):
            return None
        if any(name in module for name in values.modules_to_not_convert or ()):
            return None
        for rule, (name, changes) in zip(rules, dynamic.items(), strict=True):
            if rule(module):
                return None if name.startswith("-:") else _changed(reader, main, changes, "dynamic")
        return main

    return main, resolve, False


def _changed(
    reader: _Reader, main: WeightFormat, changes: Mapping[str, Any], key: str
) -> WeightFormat | None:
    """Return a format with a tool's changes for one module; None if they leave it float."""
    given = _Reader(changes, f"{reader.where}: {key}").convert(_Changes)
    if given.bits is not None and given.bits >= 16:
        return None
    bits = main.bits if given.bits is None else given.bits
    reader.only(f"{key}: bits", bits, _GPTQ_BITS if main.layout == "gptq" else (4,))
    reader.only(f"{key}: data_type", given.data_type, ("int",))
    size = main.group_size
    if given.group_size is not None:
        size = reader.group_size(given.group_size, f"{key}: group_size")
    return replace(
        main,
        bits=bits,
        group_size=size,
        symmetric=main.symmetric if given.sym is None else given.sym,
        act_order=main.act_order if given.desc_act is None else given.desc_act,
    )


class _Changes(msgspec.Struct):
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None
    data_type: str = "int"


# ------------------------------------------------------------------------------- AutoRound


class _AutoRound(msgspec.Struct):
    bits: int
    group_size: int = 128
    sym: bool = True
    data_type: str = "int"
    packing_format: str | None = None
    backend: str | None = None
    autoround_version: str = ""
    act_bits: int | None = None
    extra_config: dict[str, dict[str, Any]] | None = None


# Its own packing and GPTQModel's store zero points as they are.
_AUTO_ROUND: dict[str, tuple[Layout, int]] = {
    "auto_round:auto_gptq": ("gptq", 1),
    "auto_round:gptq": ("gptq", 1),
    "auto_round:gptqmodel": ("gptq", 0),
    "auto_round": ("gptq", 0),
    "auto_round:auto_awq": ("awq", 0),
    "auto_round:awq": ("awq", 0),
}
# AutoRound up to 0.6 names a kernel, too; all of these kernels pack alike.
_KERNELS = re.compile(":(?:exllamav2|tritonv2|triton|cuda|gemm)$")


def _auto_round(reader: _Reader) -> _Found:
    values = reader.convert(_AutoRound)
    # 0.3 to 0.4.7 wrote the packing as the backend, the first ones without the underscore.
    key = "backend" if values.packing_format is None and values.backend else "packing_format"
    packing = values.packing_format or values.backend or "auto_round:auto_gptq"
    name = _KERNELS.sub("", packing.replace("autoround", "auto_round"))
    if name not in _AUTO_ROUND:
        reader.only(key, packing, tuple(_AUTO_ROUND))
    reader.only("data_type", values.data_type, ("int",))
    reader.only("act_bits", values.act_bits or 16, (16, 32))
    layout, offset = _AUTO_ROUND[name]
    if name == "auto_round:gptqmodel" and values.autoround_version.startswith("0.5."):
        offset = 1  # that version packed it as auto_gptq by mistake
    reader.only("bits", values.bits, _GPTQ_BITS if layout == "gptq" else (4,))
    size = reader.group_size(values.group_size)
    main = WeightFormat(layout, values.bits, size, symmetric=values.sym, zero_offset=offset)
    extra = values.extra_config or {}
    rules = reader.patterns(
        "extra_config",
        [rf"{name}\Z" if _PLAIN.fullmatch(name) else rf"(?:{name})\Z" for name in extra],
    )

    def resolve(module: str) -> WeightFormat | None:
        changes = extra.get(module)
        if changes is None:
            found = (c for rule, c in zip(rules, extra.values(), strict=True) if rule(module))
            changes = next(found, None)
        if changes is None:
            return None if module == "lm_head" else main
        return _changed(reader, main, changes, "extra_config")

    return main, resolve, False


# ---------------------------------------------------------------------- compressed-tensors


class _CtArgs(msgspec.Struct):
    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: str | None = None
    block_structure: list[int] | str | None = None
    dynamic: bool | str = False
    actorder: bool | str | None = None


class _CtGroup(msgspec.Struct):
    targets: list[str]
    weights: _CtArgs | None = None
    input_activations: _CtArgs | None = None
    output_activations: _CtArgs | None = None
    format: str | None = None


class _CompressedTensors(msgspec.Struct):
    config_groups: dict[str, _CtGroup]
    format: str | None = None
    ignore: list[str] | None = None
    quantization_status: str = "compressed"
    kv_cache_scheme: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


_CT_LAYOUTS: dict[str, Layout] = {
    "pack-quantized": "packed",
    "int-quantized": "int8",
    "float-quantized": "fp8",
    "nvfp4-pack-quantized": "nvfp4",
}
_CT_NAIVE: dict[str, Layout] = {"int": "int8", "float": "fp8"}  # "naive-quantized", by type
_CT_BITS = {"packed": (2, 4, 8), "int8": (8,), "fp8": (8,), "nvfp4": (4,)}
_CT_STRATEGIES = {
    "packed": ("group", "channel", "tensor"),
    "int8": ("group", "channel", "tensor"),
    "fp8": ("channel", "tensor", "block"),
    "nvfp4": ("tensor_group",),
}


def _compressed_tensors(reader: _Reader) -> _Found:
    values = reader.convert(_CompressedTensors)
    # Up to 0.5 it said "frozen" for compressed weights, too; the types of the tensors tell.
    reader.only("quantization_status", values.quantization_status, ("compressed", "frozen"))
    sparsity = (values.sparsity_config or {}).get("format", "dense")
    reader.only("sparsity_config: format", sparsity, ("dense",))
    if values.transform_config and values.transform_config.get("config_groups"):
        raise reader.error("transform_config", _TRANSFORMS)
    groups = [
        (group.targets, _ct_format(reader, name, group, values.format))
        for name, group in values.config_groups.items()
    ]
    if not groups:
        raise reader.error("config_groups", "has no group")
    main = groups[0][1]
    ignored = reader.names("ignore", values.ignore or [])
    # compressed-tensors' own order: a name, then patterns by the alphabet, then all linears' class.
    forms = {target: form for targets, form in groups for target in targets}
    patterns = sorted(target for target in forms if target.startswith("re:"))
    tests = reader.patterns("targets", [pattern[3:] for pattern in patterns])

    def resolve(module: str) -> WeightFormat | None:
        if ignored(module):
            return None
        found = (name for name, test in zip(patterns, tests, strict=True) if test(module))
        return forms.get(module) or forms.get(next(found, "Linear"))

    return main, resolve, values.kv_cache_scheme is not None


def _ct_format(reader: _Reader, name: str, group: _CtGroup, default: str | None) -> WeightFormat:
    where = f"config_groups: {name}"
    form, args = group.format or default, group.weights
    reader.only(f"{where}: format", form, (*_CT_LAYOUTS, "naive-quantized"))
    if args is None:
        raise reader.error(f"{where}: weights", "is missing: nothing is said of the weights")
    reader.only(f"{where}: weights: type", args.type, tuple(_CT_NAIVE))
    layout = _CT_LAYOUTS.get(str(form)) or _CT_NAIVE[args.type]
    if group.output_activations is not None:
        raise reader.error(f"{where}: output_activations", f"are not read; {_INSTEAD}")
    kind = "int" if layout in ("packed", "int8") else "float"
    reader.only(f"{where}: weights: type", args.type, (kind,))
    reader.only(f"{where}: weights: num_bits", args.num_bits, _CT_BITS[layout])
    strategy = args.strategy or ("group" if args.group_size else "tensor")
    if args.group_size == -1:
        strategy = "channel"
    reader.only(f"{where}: weights: strategy", strategy, _CT_STRATEGIES[layout])
    size = 0
    if "group" in strategy:
        size = reader.group_size(args.group_size, f"{where}: weights: group_size")
    if layout == "nvfp4":
        reader.only(f"{where}: weights: group_size", size, (16,))
    if kind == "float":
        reader.only(f"{where}: weights: symmetric", args.symmetric, (True,))
    block = None
    if strategy == "block":
        block = _block(reader, args.block_structure, f"{where}: weights: block_structure")
    inputs, inputs_symmetric = _ct_inputs(group.input_activations)
    order = args.actorder in ("group", "dynamic", True)
    return WeightFormat(
        layout,
        args.num_bits,
        size,
        symmetric=args.symmetric,
        act_order=order,
        block=block,
        inputs=inputs,
        inputs_symmetric=inputs_symmetric,
    )


def _ct_inputs(args: _CtArgs | None) -> tuple[Inputs, bool]:
    if args is None:
        return "float", True
    if not args.dynamic:
        return "static", args.symmetric
    per_token = (args.type, args.num_bits, args.strategy) == ("int", 8, "token")
    return ("per-token" if per_token else "dynamic"), args.symmetric


def _block(reader: _Reader, block: list[int] | str | None, key: str) -> tuple[int, int]:
    sizes = re.fullmatch(r"(\d{1,9})x(\d{1,9})", block) if isinstance(block, str) else None
    if sizes:  # compressed-tensors reads old files this way
        block = [int(size) for size in sizes.groups()]
    if not isinstance(block, list) or len(block) != 2 or min(block) < 1:
        raise reader.error(key, f"must be two positive sizes, found {block!r:.80}")
    return block[0], block[1]


# --------------------------------------------------------------------------- FP8, ModelOpt


class _Fp8(msgspec.Struct):
    fmt: str = "e4m3"
    weight_block_size: list[int] | None = None
    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    modules_to_not_convert: list[str] | None = None
    ignored_layers: list[str] | None = None
    kv_cache_scheme: Any = None


def _fp8(reader: _Reader) -> _Found:
    values = reader.convert(_Fp8)
    reader.only("fmt", values.fmt, ("e4m3",))
    if values.weight_block_size is None:  # AutoFP8: one scale for a weight
        main = WeightFormat("fp8", 8, inputs=values.activation_scheme)
    else:
        reader.only("activation_scheme", values.activation_scheme, ("dynamic",))
        block = _block(reader, values.weight_block_size, "weight_block_size")
        main = WeightFormat("fp8-inv", 8, block=block, inputs="dynamic")
    # transformers matches a part of a name, AutoFP8 writes whole ones.
    kept, whole = ["lm_head", *(values.modules_to_not_convert or ())], values.ignored_layers or ()

    def resolve(module: str) -> WeightFormat | None:
        return None if module in whole or any(name in module for name in kept) else main

    return main, resolve, values.kv_cache_scheme is not None


class _ModelOpt(msgspec.Struct):
    quant_algo: str
    ignore: list[str] | None = None
    exclude_modules: list[str] | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    kv_cache_quant_algo: str | None = None


_MODELOPT = {
    "FP8": WeightFormat("fp8", 8, inputs="static"),
    "NVFP4": WeightFormat("modelopt-nvfp4", 4, 16, inputs="static"),
}


def _modelopt(reader: _Reader) -> _Found:
    values = reader.convert(_ModelOpt)
    reader.only("quant_algo", values.quant_algo, tuple(_MODELOPT))
    main = _MODELOPT[values.quant_algo]
    kept = [*(values.ignore or ()), *(values.exclude_modules or ())]

    def resolve(module: str) -> WeightFormat | None:
        return None if any(fnmatch.fnmatchcase(module, name) for name in kept) else main

    cache_scales = values.kv_cache_scheme is not None or values.kv_cache_quant_algo is not None
    return main, resolve, cache_scales


_METHODS: dict[str, Callable[[_Reader], _Found]] = {
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "modelopt": _modelopt,
}
