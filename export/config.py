"""Defines what to export and how: the options of ``edge-llm export``, checked together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from edge.bundle.manifest import Dialect, Task
from edge.bundle.schemes import Quant, fold_quant
from edge.errors import ConfigError
from edge_lab.recipe import Clip, Recipe, kind_of

from .graph.embedding_table import EmbeddingType
from .quantize.calibrated import Method
from .recipes import RECIPES, RecipeName
from .sources.documents import BUILT_IN_TOKENS, DEFAULT_TOKENS
from .sources.opening import Hub
from .targets import ANY, TARGETS, Target

GraphType = Literal["fp16", "bf16"]
KvCacheType = Literal["float", "int8"]
AS_IN_SOURCE: Literal["source"] = "source"
"""The ``--quant`` that keeps the integers of a checkpoint that is quantized already."""
DEFAULT_METHOD = RECIPES["default"].method
"""How INT4 layers are rounded; docs/quantization.md has what each method costs and loses."""


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how.

    Attributes:
        source: HF directory, hub id or GGUF file.
        output: the bundle's directory.
        quant: scheme of the linear layers; ``source`` keeps them as a quantized checkpoint has
            them. None is ``source`` for such a checkpoint and ``int4`` for others, see `resolved`.
        group_size: see `Recipe`.
        keep: see `Recipe`.
        clip: see `Recipe`.
        named: what is done where no other field says, see `recipes.RECIPES`: ``default``, ``fast``
            for a bundle at once, or ``best`` for one that loses less and takes longer.
        method: how INT4 layers are rounded: ``rtn`` to nearest, the others calibrated; None is
            that of ``named``.
        calibration: text or JSONL to calibrate with; None is the built-in text, for GPTQ and
            W8A8 the mixed one.
        calibration_tokens: most tokens to calibrate with; None is as in `most_calibration_tokens`.
        seed: decides the order of the calibration documents; None is 0.
        workers: layers that are rounded side by side, to the same bytes; each further one takes
            what calibration has seen of a layer in memory.
        rotate: rotate the residual stream and the heads' values (`quantize.rotation`); None is as
            in `rotates`.
        embeddings: how the rows of the token table are stored.
        kv_cache: how the rows of the KV cache are stored: in the graph's float type, or in INT8
            with calibrated scales, see `quantize.kv_scales`.
        lora: directory of an adapter in peft's layout to merge into the weights first.
        eagle3: directory of a published EAGLE-3 head of this model, which drafts for it.
        vocab_keep: file that says which tokens to keep, see `vocabulary.read_keep_list`; None
            keeps all.
        vocab_size: how many tokens to keep, with a text in ``vocab_keep``.
        target: the device that the bundle is for, a key of `targets.TARGETS`: it decides dialect
            and types of scales; a graph that its TensorRT does not take is refused.
        dialect: see `edge.bundle.io_spec`; None is the target's, ``native`` without one. TensorRT
            takes an INT8 cache in ``portable`` only, so a target with TensorRT gets that then.
        dtype: float type of the engine's graph; None is bf16 for ``quant="bf16"``, else fp16.
        kv_capacity: cache rows per sequence; None is `edge.bundle.io_spec.default_kv_capacity`.
        task: what the bundle is for; None is ``embed`` for a directory of sentence-transformers,
            and ``generate`` for all others.
        revision: branch, tag or commit of a hub id; None is its default branch.
        cache_dir: where a hub id is downloaded to; None is the hub's own cache.
        hub: where a hub id is looked up, see `open_checkpoint`.
        overwrite: replace an existing bundle.
        verify: measure the finished bundle against the float model before it is put in place, and
            refuse it if it misses ``gate``.
        gate: thresholds for ``verify``, see `edge_lab.measure.evaluate.load_gate`; None is
            ``recipe``.
        report: without ``verify``, measure the bundle on fewer tokens and refuse nothing; where
            that cannot be done (memory, disk), the reason is announced.
        rounding: ``method``, or the method that None means.
        recipe: how the linear layers are stored, from ``quant``, ``group_size``, ``keep`` and
            ``clip``.
        float_type: ``dtype``, or the type that None means.
        graph_dialect: ``dialect``, or the one that None means.
        device: what ``target`` stands for.
    """

    source: str
    output: Path
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
    lora: Path | None = None
    eagle3: Path | None = None
    vocab_keep: Path | None = None
    vocab_size: int | None = None
    target: str | None = None
    dialect: Dialect | None = None
    dtype: GraphType | None = None
    kv_capacity: int | None = None
    task: Task | None = None
    revision: str | None = None
    cache_dir: Path | None = None
    hub: Hub | None = None
    overwrite: bool = False
    verify: bool = False
    gate: str | None = None
    report: bool = False
    rounding: Method = field(init=False)
    recipe: Recipe = field(init=False)
    float_type: GraphType = field(init=False)
    graph_dialect: Dialect = field(init=False)
    device: Target = field(init=False)

    def __post_init__(self) -> None:
        if self.quant is not None:
            object.__setattr__(self, "quant", fold_quant(self.quant))
        implied: GraphType = "bf16" if self.quant == "bf16" else "fp16"
        if self.quant == AS_IN_SOURCE:
            self._refuse_rounding()
        quant: Quant = "int4" if self.quant is None else "fp16"
        if self.quant not in (None, AS_IN_SOURCE):
            quant = self.quant
        for option, value, choices in (
            ("--quant", quant, Quant),
            ("--clip", self.clip, Clip),
            ("--method", self.method or "rtn", Method),
            ("named", self.named, RecipeName),
            ("--embeddings", self.embeddings, EmbeddingType),
            ("--kv-cache", self.kv_cache, KvCacheType),
            ("--dialect", self.dialect or "native", Dialect),
            ("--dtype", self.dtype or implied, GraphType),
            ("--task", self.task or "generate", Task),
        ):
            if value not in get_args(choices):
                raise ConfigError(
                    f"{option} {value} is unknown; use {' or '.join(get_args(choices))}"
                )
        object.__setattr__(self, "device", self._find_device())
        object.__setattr__(self, "graph_dialect", self.dialect or self._implied_dialect())
        if self.dtype is not None and self.quant in ("fp16", "bf16") and self.dtype != implied:
            raise ConfigError(
                f"--quant {self.quant} contradicts --dtype {self.dtype}; say --quant {self.dtype}"
            )
        has_int4 = quant == "int4" or any(kind_of(scheme) == "int4" for _, scheme in self.keep)
        rounds = has_int4 and self.quant != AS_IN_SOURCE
        default: Method = RECIPES[self.named].method if rounds else "rtn"
        object.__setattr__(self, "rounding", self.method or default)
        if self.named == "fast":
            self._check_fast(has_int4)
        if self.named == "best":
            self._check_best(has_int4)
        if self.rounding != "rtn" and not has_int4:
            raise ConfigError(
                f"--method {self.method} has no effect: no layer is INT4; leave it out"
            )
        for option, setting in (
            ("--calibration", self.calibration),
            ("--calibration-tokens", self.calibration_tokens),
            ("--seed", self.seed),
        ):
            calibrates = self.rounding != "rtn" or self.rounds_inputs or self.kv_cache == "int8"
            if setting is not None and not calibrates:
                why = f"--quant {quant}, which needs no calibration;"
                if self.named == "fast":
                    why = "--fast, which calibrates nothing; leave out --fast, or"
                elif has_int4:
                    why = f"--method rtn; use --method {DEFAULT_METHOD} or"
                raise ConfigError(f"{option} has no effect with {why} leave it out")
        if self.seed is not None and not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"--seed is {self.seed}; use 0 to {(1 << 32) - 1}")
        if self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}; use 1 or more")
        # Nothing is rounded by default where the source is quantized, which `resolved` is told.
        is_open = self.quant is None and self.method is None
        if self.workers > 1 and "gptq" in self.rounding and not is_open:
            chosen = "the default " if self.method is None else ""
            raise ConfigError(
                f"--workers {self.workers} does not go with {chosen}--method {self.rounding}, "
                "which rounds a layer for what the layers before it lost; leave it out, or add "
                "--method awq"
            )
        if self.gate is not None and not self.verify:
            raise ConfigError(f"--gate {self.gate} has no effect without --verify; add it")
        if self.vocab_size is not None and self.vocab_keep is None:
            raise ConfigError(
                f"--vocab-size {self.vocab_size} needs --vocab-keep FILE, a text of the kind that "
                "the model will meet"
            )
        if self.rounding != "rtn" and self.clip != "mse" and not is_open:
            raise ConfigError(
                f"--clip {self.clip} has no effect with --method {self.rounding}; add --method rtn"
            )
        object.__setattr__(self, "float_type", self.dtype or implied)
        recipe = Recipe(quant, self.group_size, self.keep, self.clip)
        object.__setattr__(self, "recipe", recipe)
        if self.eagle3 is not None:
            self._check_head()

    def resolved(self, *, is_quantized: bool) -> ExportConfig:
        """The same with the ``quant`` that None means.

        Args:
            is_quantized: whether the checkpoint is quantized already.

        Raises:
            ConfigError: ``source`` for a float checkpoint, or options that contradict it.
        """
        if self.quant == AS_IN_SOURCE and not is_quantized:
            raise ConfigError(
                f"--quant source keeps the integers of a quantized checkpoint, but {self.source} "
                "has float weights; leave it out, or use --quant int4"
            )
        if self.quant is not None:
            return self
        return replace(self, quant=AS_IN_SOURCE if is_quantized else "int4")

    def rotates(self, task: Task) -> bool:
        """Whether hidden states and values are rotated: by default for INT8, where a model can be.

        The vectors of a model that embeds would be rotated, too, and a head that drafts was trained
        with the hidden states as they are.

        Args:
            task: of the checkpoint.
        """
        if self.rotate is not None:
            return self.rotate
        able = task != "embed" and self.eagle3 is None
        return self.quant == "int8-w8a8" or (self.quant == "int8" and able)

    @property
    def most_calibration_tokens(self) -> int:
        """Tokens to calibrate with at most; a KV cache alone takes fewer where nobody says."""
        if self.calibration_tokens is not None:
            return self.calibration_tokens
        most = BUILT_IN_TOKENS if self.calibration is None else DEFAULT_TOKENS
        if self.rounding == "rtn" or self.rounds_inputs:  # ranges of INT8 inputs take all
            return most
        return min(most, RECIPES[self.named].calibration_tokens)

    @property
    def rounds_inputs(self) -> bool:
        """Whether a recipe that is not the source's rounds inputs of some linear to INT8."""
        return self.quant == "int8-w8a8" or any(kind == "w8a8" for _, kind in self.keep)

    def check_task(self, task: Task) -> None:
        """Refuse what a model of this task cannot have.

        Args:
            task: of the checkpoint, where ``task`` is None.

        Raises:
            ConfigError: an option that is for models that generate; it is named.
        """
        if task == "generate":
            return
        rotates = self.rotates(task) and task == "embed"
        for option, given, why in (
            (f"--eagle3 {self.eagle3}", self.eagle3 is not None, "it drafts tokens"),
            (f"--vocab-keep {self.vocab_keep}", self.vocab_keep is not None, "it is not tried"),
            ("--verify", self.verify, "it measures the next token"),
            (
                "--rotate, which --quant int8-w8a8 implies (add --no-rotate),",
                rotates,
                "embeddings would be rotated, too",
            ),
        ):
            if given:
                raise ConfigError(
                    f"{option} is for models that generate, and {self.source} is to {task}: {why}; "
                    "leave it out"
                )

    def _implied_dialect(self) -> Dialect:
        needs_portable = self.kv_cache == "int8" and self.device.versions
        return "portable" if needs_portable else self.device.dialects[0]

    def _check_fast(self, has_int4: bool) -> None:
        """Refuse ``--fast`` where it would change nothing, or another option asks for more."""
        if self.method is not None:
            raise ConfigError(
                f"--fast contradicts --method {self.method}: it rounds to nearest; leave one of "
                "the two out"
            )
        if not has_int4 and self.quant != AS_IN_SOURCE:
            raise ConfigError(
                f"--fast has no effect with --quant {self.quant}: no layer is INT4; leave it out, "
                "or add --no-verify to measure nothing"
            )

    def _check_best(self, has_int4: bool) -> None:
        """Refuse ``--best`` where it would change nothing."""
        if self.quant == AS_IN_SOURCE or not has_int4:
            raise ConfigError(
                f"--best has no effect with --quant {self.quant}: no layer is rounded to INT4; "
                "leave it out"
            )
        if self.method is not None and "gptq" not in self.method:
            raise ConfigError(
                f"--best contradicts --method {self.method}: it is {DEFAULT_METHOD} with all of "
                "the calibration text; leave one of the two out"
            )

    def _refuse_rounding(self) -> None:
        """Refuse what has no effect where the source's integers are kept."""
        for option, given in (
            (f"--method {self.method}", self.method is not None),
            (f"--group-size {self.group_size}", self.group_size is not None),
            (f"--clip {self.clip}", self.clip != "mse"),
            ("--calibration", self.calibration is not None and self.kv_cache == "float"),
            (
                "--calibration-tokens",
                self.calibration_tokens is not None and self.kv_cache == "float",
            ),
            ("--seed", self.seed is not None and self.kv_cache == "float"),
            ("--rotate", bool(self.rotate)),
            ("--keep ...=w8a8", any(kind == "w8a8" for _, kind in self.keep)),
        ):
            if given:
                raise ConfigError(
                    f"{option} has no effect on {self.source}, which is quantized already and "
                    "keeps its integers (--quant source); leave it out, or quantize it anew with "
                    "another --quant, e.g. int4"
                )

    def _check_head(self) -> None:
        """Refuse what changes the hidden states or tokens that the head was trained with."""
        for option, given in (
            (
                "--rotate, which --quant int8-w8a8 implies; add --no-rotate",
                self.rotates("generate"),
            ),
            ("--vocab-keep; leave one of the two out", self.vocab_keep is not None),
        ):
            if given:
                raise ConfigError(
                    f"--eagle3 {self.eagle3} reads the model's own hidden states and tokens, so it "
                    f"does not go with {option}"
                )

    def _find_device(self) -> Target:
        if self.target is None:
            return ANY
        device = TARGETS.get(self.target)
        if device is None:
            raise ConfigError(f"--target {self.target} is unknown; use {' or '.join(TARGETS)}")
        if self.dialect is not None and self.dialect not in device.dialects:
            raise ConfigError(
                f"--target {self.target} contradicts --dialect {self.dialect}: its TensorRT takes "
                f"{' or '.join(device.dialects)} only; leave --dialect out"
            )
        if self.kv_cache == "int8" and self.dialect == "native" and device.versions:
            raise ConfigError(
                f"--kv-cache int8 contradicts --dialect native for --target {self.target}: "
                "TensorRT updates a cache of floats only; use --dialect portable, or leave "
                "--kv-cache out"
            )
        return device

    def float_reference(self) -> ExportConfig:
        """Configure the same checkpoint with float weights, to measure a bundle of it against."""
        return ExportConfig(
            source=self.source,
            output=self.output,
            quant=self.float_type,
            lora=self.lora,
            vocab_keep=self.vocab_keep,
            vocab_size=self.vocab_size,
            dialect=self.graph_dialect,
            kv_capacity=self.kv_capacity,
        )
