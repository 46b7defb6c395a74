"""Defines what to export and how: the options of ``edge-llm export``, checked together.

They form three values: the model to export, how its numbers are stored, and what the bundle is for.
Each stage of the export takes those that it needs.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from edge.adapters.graph_inputs import MAX_RANK
from edge.bundle.manifest import Dialect
from edge.bundle.quant_rules import Quant, fold_quant
from edge.errors import ConfigError
from edge.model.spec import Task
from edge_make.recipe import Clip, Recipe, kind_of

from .graph.embedding_table import EmbeddingType
from .quantize.calibrated import Method
from .recipes import RECIPES, RecipeName
from .sources.documents import BUILT_IN_TOKENS, DEFAULT_TOKENS
from .sources.opening import Hub
from .targets import ANY, TARGETS, Target

GraphType = Literal["fp16", "bf16"]
KvCacheType = Literal["float", "int8"]
VisionWeights = Literal["fp16", "int8"]
AS_IN_SOURCE: Literal["source"] = "source"
"""Value of ``--quant`` that keeps the integers of a checkpoint that is quantized already."""
DEFAULT_METHOD = RECIPES["default"].method
"""Method that rounds INT4 layers by default; docs/quantization.md compares the methods."""


@dataclass(frozen=True)
class ExportSource:
    """The model to export, and the changes to it that are exact in float.

    Attributes:
        source: HF directory, hub id or GGUF file.
        revision: branch, tag or commit of a hub id; None is its default branch.
        cache_dir: directory to download a hub id to; None is the hub's own cache.
        hub: hub that has a hub id, as for `open_checkpoint`.
        task: use of the bundle; None is ``embed`` for a directory of sentence-transformers, and
            ``generate`` for all others.
        lora: directory of an adapter in peft's layout to merge into the weights first.
        eagle3: directory of a published EAGLE-3 head of this model, which drafts for it.
        vocab_keep: file that says which tokens to keep, read by `vocabulary.read_keep_list`; None
            keeps all.
        vocab_size: number of tokens to keep, with a text in ``vocab_keep``.
    """

    source: str
    _: KW_ONLY
    revision: str | None = None
    cache_dir: Path | None = None
    hub: Hub | None = None
    task: Task | None = None
    lora: Path | None = None
    eagle3: Path | None = None
    vocab_keep: Path | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        _check_choices(("--task", self.task or "generate", Task))
        if self.vocab_size is not None and self.vocab_keep is None:
            raise ConfigError(
                f"--vocab-size {self.vocab_size} needs --vocab-keep FILE, a text of the kind that "
                "the model will meet"
            )


@dataclass(frozen=True, kw_only=True)
class ExportRecipe:
    """How the numbers of a model are stored, and how they are found.

    Attributes:
        quant: scheme of the linear layers; ``source`` keeps them as a quantized checkpoint has
            them. None is ``source`` for such a checkpoint and ``int4`` for others (`resolved`).
        group_size: weights that share a scale, as in `Recipe`.
        keep: layers with a scheme of their own, as in `Recipe`.
        clip: how a group's scale is chosen, as in `Recipe`.
        named: recipe that decides where no other field does (`recipes.RECIPES`): ``default``,
            ``fast`` for a quick bundle, or ``best`` for one that loses less and takes longer.
        method: how INT4 layers are rounded: ``rtn`` to nearest, the others calibrated; None is
            the method of ``named``.
        calibration: text or JSONL to calibrate with; None is the built-in text, for GPTQ and
            W8A8 the mixed one.
        calibration_tokens: most tokens to calibrate with; None is `most_calibration_tokens`.
        seed: seed of the order of the calibration documents; None is 0.
        workers: layers to round side by side, to the same bytes; each further one keeps the
            calibration's inputs of a layer in memory.
        rotate: whether to rotate the residual stream and the heads' values (`quantize.rotation`);
            None lets `rotates` decide.
        embeddings: how the rows of the token table are stored.
        kv_cache: how the rows of the KV cache are stored: in the graph's float type, or in INT8
            with calibrated scales (`quantize.kv_scales`).
        dtype: float type of the engine's graph; None is bf16 for ``quant="bf16"``, else fp16.
        vision_quant: how the weights of a vision encoder are stored, ``fp16`` or ``int8``; None is
            the float type of the graph.
        adapters: the largest rank of adapters that the bundle takes at run time; None is a bundle
            that takes none.
            that takes none.
    """

    quant: Quant | Literal["source"] | None = None
    group_size: int | None = None
    keep: tuple[tuple[str, str], ...] = ()
    clip: Clip = "mse"
    named: RecipeName = "default"
    method: Method | None = None
    calibration: Path | None = None
    calibration_tokens: int | None = None
    seed: int | None = None
    workers: int = 1
    rotate: bool | None = None
    embeddings: EmbeddingType = "fp16"
    kv_cache: KvCacheType = "float"
    dtype: GraphType | None = None
    vision_quant: VisionWeights | None = None
    adapters: int | None = None

    def __post_init__(self) -> None:
        if self.quant is not None:
            object.__setattr__(self, "quant", fold_quant(self.quant))
        _check_choices(
            ("--quant", self.linears.quant, Quant),
            ("--clip", self.clip, Clip),
            ("--method", self.method or "rtn", Method),
            ("named", self.named, RecipeName),
            ("--embeddings", self.embeddings, EmbeddingType),
            ("--kv-cache", self.kv_cache, KvCacheType),
            ("--dtype", self.float_type, GraphType),
            ("--vision-quant", self.vision_quant or "int8", VisionWeights),
        )
        if self.vision_quant == "fp16" and self.float_type != "fp16":
            raise ConfigError(
                f"--vision-quant fp16 contradicts --dtype {self.float_type}, which is the type of "
                "both graphs; leave it out"
            )
        if self.adapters is not None:
            self._check_adapters(self.adapters)
        if self.quant in ("fp16", "bf16") and self.float_type != self.quant:
            raise ConfigError(
                f"--quant {self.quant} contradicts --dtype {self.dtype}; say --quant {self.dtype}"
            )
        if self.named == "fast":
            self._check_fast()
        if self.named == "best":
            self._check_best()
        if self.rounding != "rtn" and not self._has_int4:
            raise ConfigError(
                f"--method {self.method} has no effect: no layer is INT4; leave it out"
            )
        self._check_calibration()
        if self.seed is not None and not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"--seed is {self.seed}; use 0 to {(1 << 32) - 1}")
        if self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}; use 1 or more")
        if self.quant is None and self.method is None:
            return  # a quantized source is not rounded, which only `resolved` is told
        if self.workers > 1 and "gptq" in self.rounding:
            chosen = "the default " if self.method is None else ""
            raise ConfigError(
                f"--workers {self.workers} does not go with {chosen}--method {self.rounding}, "
                "which rounds a layer for what the layers before it lost; leave it out, or add "
                "--method awq"
            )
        if self.rounding != "rtn" and self.clip != "mse":
            raise ConfigError(
                f"--clip {self.clip} has no effect with --method {self.rounding}; add --method rtn"
            )

    @property
    def linears(self) -> Recipe:
        """Recipe of the linear layers; with ``quant="source"`` it has the exceptions only."""
        quant: Quant = "int4" if self.quant is None else "fp16"
        if self.quant not in (None, AS_IN_SOURCE):
            quant = self.quant
        return Recipe(quant, self.group_size, self.keep, self.clip)

    @property
    def name(self) -> str:
        """Name of the recipe in the manifest."""
        return self.quant or self.linears.quant

    @property
    def rounding(self) -> Method:
        """``method``, or the method that None means."""
        rounds = self._has_int4 and self.quant != AS_IN_SOURCE
        return self.method or (RECIPES[self.named].method if rounds else "rtn")

    @property
    def float_type(self) -> GraphType:
        """``dtype``, or the type that None means."""
        return self.dtype or ("bf16" if self.quant == "bf16" else "fp16")

    @property
    def most_calibration_tokens(self) -> int:
        """Most tokens to calibrate with; by default a KV cache alone takes fewer."""
        if self.calibration_tokens is not None:
            return self.calibration_tokens
        most = BUILT_IN_TOKENS if self.calibration is None else DEFAULT_TOKENS
        if self.rounding == "rtn" or self.rounds_inputs:  # ranges of INT8 inputs take all
            return most
        return min(most, RECIPES[self.named].calibration_tokens)

    @property
    def rounds_inputs(self) -> bool:
        """Whether a recipe other than the source's rounds inputs of some linear to INT8."""
        return self.quant == "int8-w8a8" or any(kind == "w8a8" for _, kind in self.keep)

    @property
    def _has_int4(self) -> bool:
        return self.linears.quant == "int4" or any(kind_of(each) == "int4" for _, each in self.keep)

    def resolved(self, source: str, *, is_quantized: bool) -> ExportRecipe:
        """Return the same recipe with the ``quant`` that None stands for.

        Args:
            source: the checkpoint, for messages.
            is_quantized: whether it is quantized already.

        Raises:
            ConfigError: ``source`` for a float checkpoint, or options that contradict it.
        """
        if self.quant == AS_IN_SOURCE and not is_quantized:
            raise ConfigError(
                f"--quant source keeps the integers of a quantized checkpoint, but {source} "
                "has float weights; leave it out, or use --quant int4"
            )
        if self.quant is not None:
            return self
        if is_quantized:
            self.refuse_rounding(source)
        return replace(self, quant=AS_IN_SOURCE if is_quantized else "int4")

    def float_reference(self) -> ExportRecipe:
        """Return the recipe of the same model in float, to measure a bundle of it against."""
        return ExportRecipe(quant=self.float_type)

    def rotates(self, task: Task, *, drafts: bool) -> bool:
        """Whether hidden states and values are rotated: by default for INT8, if the model allows.

        A model that embeds is not rotated, since its vectors would be, too. Neither is one with a
        head that drafts, or with adapters: they were trained with the hidden states as they are.

        Args:
            task: task of the checkpoint.
            drafts: whether a head that drafts goes into the bundle.
        """
        if self.rotate is not None:
            return self.rotate
        able = task != "embed" and not drafts and self.adapters is None
        return self.quant == "int8-w8a8" or (self.quant == "int8" and able)

    def refuse_rounding(self, source: str) -> None:
        """Refuse options that have no effect where the source's integers are kept.

        Args:
            source: the checkpoint, for messages.

        Raises:
            ConfigError: there is such an option; the message names it.
        """
        in_float = self.kv_cache == "float"
        for option, given in (
            (f"--method {self.method}", self.method is not None),
            (f"--group-size {self.group_size}", self.group_size is not None),
            (f"--clip {self.clip}", self.clip != "mse"),
            ("--calibration", self.calibration is not None and in_float),
            ("--calibration-tokens", self.calibration_tokens is not None and in_float),
            ("--seed", self.seed is not None and in_float),
            ("--rotate", bool(self.rotate)),
            ("--keep ...=w8a8", any(kind == "w8a8" for _, kind in self.keep)),
        ):
            if given:
                raise ConfigError(
                    f"{option} has no effect on {source}, which is quantized already and "
                    "keeps its integers (--quant source); leave it out, or quantize it anew with "
                    "another --quant, e.g. int4"
                )

    def _check_adapters(self, rank: int) -> None:
        """Refuse a rank out of range, and options that change the channels that adapters read."""
        if not 1 <= rank <= MAX_RANK:
            raise ConfigError(f"--adapters {rank} is out of range: use a rank of 1 to {MAX_RANK}")
        if self.rotates("generate", drafts=False):
            raise ConfigError(
                f"--adapters {rank} does not go with --rotate, which --quant int8-w8a8 implies: "
                "adapters read the hidden states as they are; add --no-rotate"
            )

    def _check_fast(self) -> None:
        """Refuse ``--fast`` where it would change nothing, or another option asks for more."""
        if self.method is not None:
            raise ConfigError(
                f"--fast contradicts --method {self.method}: it rounds to nearest; leave one of "
                "the two out"
            )
        if not self._has_int4 and self.quant != AS_IN_SOURCE:
            raise ConfigError(
                f"--fast has no effect with --quant {self.quant}: no layer is INT4; leave it out, "
                "or add --no-verify to measure nothing"
            )

    def _check_best(self) -> None:
        """Refuse ``--best`` where it would change nothing."""
        if self.quant == AS_IN_SOURCE or not self._has_int4:
            raise ConfigError(
                f"--best has no effect with --quant {self.quant}: no layer is rounded to INT4; "
                "leave it out"
            )
        if self.method is not None and "gptq" not in self.method:
            raise ConfigError(
                f"--best contradicts --method {self.method}: it is {DEFAULT_METHOD} with all of "
                "the calibration text; leave one of the two out"
            )

    def _check_calibration(self) -> None:
        """Refuse calibration options where nothing is calibrated."""
        if self.rounding != "rtn" or self.rounds_inputs or self.kv_cache == "int8":
            return
        for option, setting in (
            ("--calibration", self.calibration),
            ("--calibration-tokens", self.calibration_tokens),
            ("--seed", self.seed),
        ):
            if setting is not None:
                why = f"--quant {self.linears.quant}, which needs no calibration;"
                if self.named == "fast":
                    why = "--fast, which calibrates nothing; leave out --fast, or"
                elif self._has_int4:
                    why = f"--method rtn; use --method {DEFAULT_METHOD} or"
                raise ConfigError(f"{option} has no effect with {why} leave it out")


@dataclass(frozen=True)
class ExportTarget:
    """Place and purpose of the bundle, and whether it is measured on the way.

    Attributes:
        output: the bundle's directory.
        overwrite: whether to replace an existing bundle.
        target: the device that the bundle is for, a key of `targets.TARGETS`: it decides dialect
            and types of scales; a graph that its TensorRT does not take is refused.
        dialect: dialect of the graph (`edge.bundle.io_spec`); None is the target's, ``native``
            without one. TensorRT takes an INT8 cache in ``portable`` only, so a target with
            TensorRT gets that then.
        kv_capacity: cache rows per sequence; None is `edge_make.default_kv_capacity`.
        verify: whether to measure the finished bundle against the float model, and to refuse it if
            it misses ``gate``, before it is put in place.
        gate: thresholds for ``verify``, as for `edge_lab.measure.evaluate.load_gate`; None is
            ``recipe``.
        report: whether to measure the bundle without ``verify``, on fewer tokens and refusing
            nothing; if that cannot be done (memory, disk), the reason is announced.
    """

    output: Path
    _: KW_ONLY
    overwrite: bool = False
    target: str | None = None
    dialect: Dialect | None = None
    kv_capacity: int | None = None
    verify: bool = False
    gate: str | None = None
    report: bool = False

    def __post_init__(self) -> None:
        _check_choices(("--dialect", self.dialect or "native", Dialect))
        if self.target is not None and self.target not in TARGETS:
            raise ConfigError(f"--target {self.target} is unknown; use {' or '.join(TARGETS)}")
        if self.dialect is not None and self.dialect not in self.device.dialects:
            raise ConfigError(
                f"--target {self.target} contradicts --dialect {self.dialect}: its TensorRT takes "
                f"{' or '.join(self.device.dialects)} only; leave --dialect out"
            )
        if self.gate is not None and not self.verify:
            raise ConfigError(f"--gate {self.gate} has no effect without --verify; add it")

    @property
    def device(self) -> Target:
        """Device that ``target`` names."""
        return ANY if self.target is None else TARGETS[self.target]

    def dialect_with(self, kv_cache: KvCacheType) -> Dialect:
        """Return ``dialect``, or the one that None stands for with such a cache.

        Raises:
            ConfigError: the target's TensorRT does not take such a cache in ``dialect``.
        """
        if kv_cache == "float" or not self.device.versions:
            return self.dialect or self.device.dialects[0]
        if self.dialect == "native":
            raise ConfigError(
                f"--kv-cache int8 contradicts --dialect native for --target {self.target}: "
                "TensorRT updates a cache of floats only; use --dialect portable, or leave "
                "--kv-cache out"
            )
        return "portable"


@dataclass(frozen=True)
class ExportConfig(ExportRecipe, ExportTarget, ExportSource):
    """All options of an export, checked against each other; their own classes explain them."""

    def __post_init__(self) -> None:
        if self.quant is not None and fold_quant(self.quant) == AS_IN_SOURCE:
            self.refuse_rounding(self.source)
        ExportRecipe.__post_init__(self)
        ExportTarget.__post_init__(self)
        ExportSource.__post_init__(self)
        self.dialect_with(self.kv_cache)
        if self.eagle3 is not None:
            self._check_head()

    def _check_head(self) -> None:
        """Refuse options that change the hidden states or tokens that the head was trained with."""
        option = None
        if self.rotates("generate", drafts=True):
            option = "--rotate, which --quant int8-w8a8 implies; add --no-rotate"
        elif self.vocab_keep is not None:
            option = "--vocab-keep; leave one of the two out"
        if option is not None:
            raise ConfigError(
                f"--eagle3 {self.eagle3} reads the model's own hidden states and tokens, so it "
                f"does not go with {option}"
            )


def _check_choices(*options: tuple[str, str, Any]) -> None:
    """Refuse a value that its type does not list; mypy checks only calls in Python."""
    for option, value, choices in options:
        if value not in get_args(choices):
            raise ConfigError(f"{option} {value} is unknown; use {' or '.join(get_args(choices))}")


def values_of(
    kind: type[ExportSource | ExportRecipe | ExportTarget], config: ExportConfig
) -> dict[str, Any]:
    """Return the options that one of the three values has, by name."""
    return {each.name: getattr(config, each.name) for each in fields(kind)}
