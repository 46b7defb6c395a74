"""Defines `EngineConfig`: every option of the engine, with type, range, default and description.

`edge.LLM`, the scheduler, the backends, the service and the command line all read this class: its
fields are their options, keys and flags, and the docstring's text about a field is the help of its
flag. A new option is added here and where it takes effect.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypedDict

from msgspec import Meta

from .errors import ConfigError
from .settings_fields import FINDER, Section, check_fields, unknown_name

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

BackendName = Literal["auto", "tensorrt", "ort-cuda", "ort-cpu"]
Prefill = Literal["plain", "int8"]
GpuWait = Literal["auto", "spin", "yield", "block"]
GPU_BACKENDS = ("tensorrt", "ort-cuda")
INT8_PREFILL_TOKENS = 16
"""Tokens of a sequence in one step from which on ``prefill`` int8 takes the INT8 products."""
LEAST_CHUNK = 3
"""Tokens of the longest step at least, to run no token alone: an odd number is twos and a three."""
_DRAFT_TOKENS = 5
EAGLE3 = Path("eagle3")
"""The `EngineConfig.draft` that means the bundle's own head."""
_Positive = Annotated[int, Meta(ge=1)]
_Count = Annotated[int, Meta(ge=0)]


def _find_draft(text: str, base: Path) -> Path:
    if text == str(EAGLE3):
        return EAGLE3
    from .bundle.library import find_setting

    return find_setting(text, base)


class EngineOptions(TypedDict, total=False):
    """The fields of `EngineConfig` as keyword arguments, for type checkers and editors."""

    backend: BackendName
    kv_capacity: int | None
    num_threads: int | None
    gpu_wait: GpuWait
    prefill: Prefill
    prefill_chunk: int
    int8_activations: bool | None
    deterministic: bool
    num_slots: int
    max_batch: int | None
    queue_capacity: int
    target_itl_ms: float | None
    reuse_prefix: bool
    overflow: Literal["stop", "slide"]
    draft: str | Path | None
    speculative: int | None
    prefix_dir: str | Path | None
    stop_when_sure: float | None
    trusted_keys: str | Path | None
    image_tiles: int | None


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a bundle is opened and its answers are computed.

    Attributes:
        backend: engine that runs the bundle; auto takes a TensorRT engine of the bundle, which on a
            machine with a GPU must work, else ONNX Runtime on a CUDA GPU, else on the CPU.
        kv_capacity: tokens that prompt and answer may take together; by default the bundle's own,
            or what memory holds of it.
        num_threads: CPU threads, with which auto takes the CPU; by default one per physical core
            that this process may use.
        gpu_wait: how the thread that runs a TensorRT engine waits for the end of a step: spin asks
            again and again, yield lets other threads run in between, block sleeps until the GPU's
            interrupt, the latest to wake up and the only one that leaves its CPU free. auto is what
            this process has chosen already, else spin where it may run on four CPUs or more, else
            yield. Any other value makes the backend auto take TensorRT, and is refused without it.
        prefill: int8 makes the CPU read prompts two to three times as fast, with activations
            rounded to int8 and weights of a byte each, which are held besides the bundle's own and
            refused where memory does not hold them; plain multiplies as in decode.
        prefill_chunk: prompt tokens per step at most; an engine may take fewer. Drafts need at
            least 2, prefill int8 16.
        int8_activations: let the CPU round activations to int8, its fastest kernel; by default
            where it can. Off is many times slower, but exact. On is refused where nothing can be
            rounded; GPU engines never round.
        deterministic: on the CPU, a request has the same answer to the bit whatever else runs,
            however its prompt is cut and whatever is cached. Of an earlier answer no rows are used
            again, and nothing is drafted.
        num_slots: sequences that the KV cache has room for: running ones, and ended ones whose rows
            are kept.
        max_batch: sequences that are computed at once; by default one per slot. More than a
            TensorRT engine was built for (build --max-batch) take turns.
        queue_capacity: sequences that may wait for a slot; one more is refused, by the service
            with 429, and so are more new forms of answers than this.
        target_itl_ms: milliseconds between two tokens of a stream that must be kept: fewer
            sequences are then computed at once, and prompts get what is left. By default all
            slots are used, and a prompt runs at nine tenths of the speed that it has alone.
        reuse_prefix: keep the cache rows of ended sequences for later prompts that begin alike.
        overflow: when a slot of the cache is full, stop ends the answer; slide drops old tokens,
            except the first ones, and goes on.
        draft: a smaller bundle with the same tokenizer that drafts tokens (on the command line and
            in settings also by its name), or eagle3 for the bundle's own head, where that is
            measured to pay; answers stay what they are. It takes memory of its own, with as many
            slots.
        speculative: drafted tokens per step at most, where that is measured to pay; guessed by
            draft, or without one from what the text repeats. 0 drafts none; by default 0, or 5
            with draft.
        prefix_dir: directory of prefixes that edge-llm cache build stored; prompts that begin with
            one of them load its rows.
        stop_when_sure: end a thought once trials at its paragraphs give the same answer twice, each
            with at least this probability, e.g. 0.9. Trials run in slots that are free, so it takes
            two slots or more; a request may say otherwise. By default thoughts end by themselves.
        trusted_keys: file of minisign public keys; a bundle that none of them has signed is not
            opened. By default what EDGE_LLM_TRUSTED_KEYS names, or /etc/edge-llm/trusted-keys where
            it exists; without any, every bundle is opened.
        image_tiles: tiles that a picture is cut into at most, beside the one that shows it whole;
            each takes as many tokens as the others and is seen more sharply. By default 1 on a CPU,
            on a GPU what the model was trained with. Only for bundles that read pictures.

    Raises:
        ConfigError: a value of the wrong type or out of its range, or two that exclude each other.
    """

    backend: BackendName = "auto"
    kv_capacity: _Positive | None = None
    num_threads: _Positive | None = None
    gpu_wait: GpuWait = "auto"
    prefill: Prefill = "plain"
    prefill_chunk: _Positive = 512
    int8_activations: bool | None = None
    deterministic: bool = False
    num_slots: _Positive = 4
    max_batch: _Positive | None = None
    queue_capacity: _Count = 64
    target_itl_ms: Annotated[float, Meta(gt=0)] | None = None
    reuse_prefix: bool = True
    overflow: Literal["stop", "slide"] = "stop"
    draft: Path | None = dataclasses.field(default=None, metadata={FINDER: _find_draft})
    speculative: _Count | None = None
    prefix_dir: Path | None = None
    stop_when_sure: Annotated[float, Meta(gt=0, le=1)] | None = None
    trusted_keys: Path | None = None
    image_tiles: _Count | None = None

    SECTIONS: ClassVar[dict[Section, tuple[str, ...]]] = {
        "Engine": (
            "backend", "num_threads", "prefill", "draft", "speculative", "stop_when_sure",
            "image_tiles",
        ),
        "Memory": ("kv_capacity", "num_slots", "overflow", "prefix_dir"),
        "Expert": (
            "gpu_wait", "prefill_chunk", "int8_activations", "deterministic", "max_batch",
            "queue_capacity", "target_itl_ms", "reuse_prefix", "trusted_keys",
        ),
    }  # fmt: skip
    """Where the help of a verb shows each option."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_batch is not None and self.max_batch > self.num_slots:
            raise ConfigError(
                f"max_batch is {self.max_batch}, but there are {self.num_slots} slots; raise "
                "num_slots, or leave max_batch open for one per slot"
            )
        if self.deterministic:
            self._check_deterministic()
        if self.draft is not None and self.speculative == 0:
            raise ConfigError(
                f"draft is {self.draft}, but speculative is 0, which drafts nothing: leave one out"
            )
        if self.max_draft_tokens and self.prefill_chunk < 2:
            raise ConfigError(
                f"prefill_chunk is {self.prefill_chunk}, so no step has room for a drafted token: "
                "raise it, or leave speculative and draft out"
            )
        if self.prefill == "int8" and self.prefill_chunk < INT8_PREFILL_TOKENS:
            raise ConfigError(
                f"prefill_chunk is {self.prefill_chunk}, and prefill int8 multiplies steps of "
                f"{INT8_PREFILL_TOKENS} tokens and more: raise it, or leave prefill out"
            )
        wish = self.cpu_option
        if wish is not None and self.backend in GPU_BACKENDS:
            raise ConfigError(
                f"{wish} is for ort-cpu, and {self.backend} computes on the GPU: leave one out"
            )
        if self.gpu_option is not None and (wish is not None or self.backend.startswith("ort-")):
            raise ConfigError(
                f"{self.gpu_option} is for tensorrt, and {wish or self.backend} is not: leave one "
                "out"
            )

    def _check_deterministic(self) -> None:
        for given, option, why in (
            (self.prefill == "int8", "prefill int8", "rounds a token by those beside it"),
            (self.max_draft_tokens, "speculative or draft", "computes tokens in steps of several"),
            (self.prefix_dir, "prefix_dir", "brings rows that another process computed"),
            (self.stop_when_sure, "stop_when_sure", "tries answers in slots that are free"),
        ):
            if given:
                raise ConfigError(
                    f"{option} {why}, so answers are not deterministic: leave one of the two out"
                )
        if self.prefill_chunk < LEAST_CHUNK:
            raise ConfigError(
                f"prefill_chunk is {self.prefill_chunk}; deterministic cuts prompts into chunks of "
                f"two tokens or more, which takes {LEAST_CHUNK}"
            )

    @property
    def cpu_option(self) -> str | None:
        """Name of an option that is set and that only the CPU can honour; None if there is none."""
        if self.num_threads is not None:
            return "num_threads"
        if self.prefill == "int8":
            return "prefill"
        if self.deterministic:
            return "deterministic"
        return "int8_activations" if self.int8_activations else None

    @property
    def gpu_option(self) -> str | None:
        """Name of an option that is set and that only TensorRT can honour; None without one."""
        return None if self.gpu_wait == "auto" else "gpu_wait"

    @property
    def drafts_with_head(self) -> bool:
        """Whether the bundle's own head drafts."""
        return self.draft == EAGLE3

    @property
    def max_draft_tokens(self) -> int:
        """Drafted tokens per step at most: `speculative`, or its default."""
        if self.speculative is None:
            return 0 if self.draft is None else _DRAFT_TOKENS
        return self.speculative

    @property
    def target_itl_s(self) -> float | None:
        """`target_itl_ms` in seconds."""
        return None if self.target_itl_ms is None else self.target_itl_ms / 1e3

    def with_options(self, **options: Unpack[EngineOptions]) -> Self:
        """Return the same configuration with other values.

        Raises:
            ConfigError: an unknown option, named with the nearest known one; or see the class.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise unknown_name(f"the engine has no option {name!r}", name, known)
        # A text as draft, prefix_dir or trusted_keys becomes a path when it is checked.
        return dataclasses.replace(self, **options)  # type: ignore[arg-type]
