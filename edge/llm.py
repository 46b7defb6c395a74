"""`LLM`: a bundle opened for use, text in and text out."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from . import manifest as manifests
from .backends import Backend
from .chat import (
    ChatTemplate,
    ReasoningSplitter,
    encode_chat,
    prompt_opens_reasoning,
    template_reasons,
)
from .embeddings import EMBEDDINGS_NAME, EmbeddingTable
from .errors import BundleError, ConfigError, RequestError
from .generation import Decoder, FinishReason, GenerationStats
from .sampling import SampledToken, Sampler, SamplingParams
from .tokenizer import Detokenizer, StopMatcher, Tokenizer

BackendName = Literal["auto", "ort-cpu"]
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Plain text, token ids, or chat messages ``{"role": ..., "content": ...}``."""


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of a streamed answer.

    Attributes:
        text: new text of the answer.
        reasoning: new text of the reasoning (inside ``<think>``).
        tokens: the tokens behind this piece, end token excluded; their text may come later.
        finish_reason: on the last piece: ``stop`` (end token or stop string) or ``length``
            (``max_tokens`` or the cache is full).
        stats: on the last piece.
    """

    text: str
    reasoning: str
    tokens: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stats: GenerationStats | None = None


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer; see `GenerationChunk`."""

    text: str
    reasoning: str
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason
    stats: GenerationStats = field(repr=False)


class LLM:
    """A bundle, opened. Use it as a context manager.

    One generation runs at a time: a second one while a stream is open is refused.

    Args:
        bundle: directory that ``edge-llm export`` wrote.
        backend: ``auto`` or ``ort-cpu``.
        kv_capacity: tokens that prompt and answer may take together; None is the bundle's own.
        num_threads: of the CPU backend; None is one per physical core.
        prefill_chunk: prompt tokens per step.
        int8_activations: let the CPU backend round activations to int8, its fastest kernel; see
            `OrtBackend`.
        reuse_prefix: keep the cache rows that a prompt shares with the one before it. Off by
            default: a prompt cut in other chunks can differ in the last bits of its logits.

    Raises:
        IntegrityError: a file of the bundle is damaged; nothing of it was parsed.
        BundleError, ConfigError, DependencyError, BackendError: see there.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        backend: BackendName = "auto",
        kv_capacity: int | None = None,
        num_threads: int | None = None,
        prefill_chunk: int = 512,
        int8_activations: bool = True,
        reuse_prefix: bool = False,
    ) -> None:
        self.bundle = Path(bundle)
        if backend not in ("auto", "ort-cpu"):
            raise ConfigError(f"unknown backend {backend!r}; use auto or ort-cpu")
        self.manifest = manifests.read_manifest(self.bundle)
        # All that is listed and all that is read: what is not listed is refused, too.
        read = ["tokenizer.json", EMBEDDINGS_NAME, self.manifest.graphs.cpu]
        names = dict.fromkeys([*self.manifest.files, *read])
        manifests.verify_files(self.bundle, self.manifest, names)
        self.tokenizer = Tokenizer.from_file(self.bundle / "tokenizer.json", self.manifest.tokens)
        self.template = self._read_template()
        self._reasons = self.template is not None and template_reasons(
            self.template.source, self.tokenizer.control_tokens
        )
        self.backend: Backend = self._open_backend(
            kv_capacity, num_threads, prefill_chunk, int8_activations
        )
        # Last, since nothing that fails after it would close its file.
        self.embeddings = EmbeddingTable(self.bundle / EMBEDDINGS_NAME)
        self._decoder = Decoder(self.backend, self.embeddings)
        self._reuse_prefix = reuse_prefix
        self._busy = threading.Lock()

    @property
    def kv_capacity(self) -> int:
        """Tokens that prompt and answer may take together."""
        return self.backend.capacity

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are in the cache now."""
        return self._decoder.cursor.length

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, the begin token included where the model wants one.

        Plain text never becomes a control token. Token ids stay as they are. Messages go through
        the bundle's chat template.

        Raises:
            RequestError: a malformed message, or messages for a bundle without a template.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_bos=self.manifest.tokens.add_bos)
        if _is_ids(prompt):
            return list(prompt)
        if self.template is None:
            raise RequestError(
                "this bundle has no chat template, so it takes plain text only; pass a string"
            )
        return encode_chat(self.tokenizer, self.template, cast(Sequence[Mapping[str, Any]], prompt))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[GenerationChunk, None, None]:
        """Generate text piece by piece; another generation may begin after the last piece.

        Reasoning is split off for chats only; otherwise text comes back as the model wrote it.

        Raises:
            RequestError: a wrong prompt or parameter, or a generation is running already.
            ContextLengthError: the prompt does not fit into the cache.
            BackendError: the engine failed.
        """
        ids = self.encode(prompt)
        splitter = None
        if self._reasons and not isinstance(prompt, str) and not _is_ids(prompt):
            splitter = ReasoningSplitter(prompt_opens_reasoning(self.tokenizer.decode(ids[-8:])))
        resolved = self._resolve(params)
        text = _TextStream(Detokenizer(self.tokenizer), StopMatcher(resolved.stop), splitter)
        return self._stream(ids, resolved, text)

    def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> GenerationResult:
        """Generate a whole answer; see `stream`."""
        text: list[str] = []
        reasoning: list[str] = []
        tokens: list[SampledToken] = []
        for chunk in self.stream(prompt, params):
            text.append(chunk.text)
            reasoning.append(chunk.reasoning)
            tokens += chunk.tokens
            if chunk.finish_reason is not None and chunk.stats is not None:
                return GenerationResult(
                    "".join(text),
                    "".join(reasoning),
                    tuple(tokens),
                    chunk.finish_reason,
                    chunk.stats,
                )
        raise AssertionError("a stream ends with a finish reason")

    def generate_ids(
        self, ids: Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[int]:
        """Token ids in, token ids out; the end token is not yielded.

        Raises:
            RequestError: see `stream`; also if ``params`` has stop strings, which need text.
        """
        resolved = self._resolve(params)
        if resolved.stop:
            raise RequestError("generate_ids works without text; use stop_token_ids, not stop")
        with closing(self._tokens(list(ids), resolved, GenerationStats())) as tokens:
            for token, reason in tokens:
                if reason == "stop":
                    return
                yield token.id

    def score(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """Log-probability of every token but the first; see `generation.Decoder.score`."""
        with self._exclusive():
            return self._decoder.score(list(ids))

    def close(self) -> None:
        """Free the engine and close the files; calling it twice is harmless."""
        self.backend.close()
        self.embeddings.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _stream(
        self, ids: list[int], params: SamplingParams, text: _TextStream
    ) -> Generator[GenerationChunk, None, None]:
        stats = GenerationStats()
        with closing(self._tokens(ids, params, stats)) as sampled:
            for token, reason in sampled:
                ended = reason == "stop"
                tokens = () if ended else (token,)
                answer, reasoning, stopped = ("", "", False) if ended else text.push(token.id)
                if stopped:
                    reason = "stop"
                if reason is None:
                    yield GenerationChunk(answer, reasoning, tokens)
                    continue
                last_answer, last_reasoning = text.finish(stopped)
                sampled.close()  # the engine is free before the caller sees the end
                yield GenerationChunk(
                    answer + last_answer, reasoning + last_reasoning, tokens, reason, stats
                )

    def _tokens(
        self, ids: list[int], params: SamplingParams, stats: GenerationStats
    ) -> Generator[tuple[SampledToken, FinishReason | None], None, None]:
        sampler = Sampler(params, self.manifest.model.vocab_size, ids)
        end_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids.update(self.manifest.tokens.eos)
        with self._exclusive():
            yield from self._decoder.generate(
                ids,
                sampler,
                stats,
                max_tokens=params.max_tokens,
                end_ids=end_ids,
                reuse=self._reuse_prefix,
            )

    def _resolve(self, params: SamplingParams | None) -> SamplingParams:
        return (params or SamplingParams()).resolve(self.manifest.sampling)

    def _exclusive(self) -> _Exclusive:
        return _Exclusive(self._busy)

    def _read_template(self) -> ChatTemplate | None:
        name = "chat_template.jinja"
        if name not in self.manifest.files:
            return None
        try:
            source = (self.bundle / name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{self.bundle / name} is not UTF-8; export again") from error
        return ChatTemplate(source, self.manifest.tokens)

    def _open_backend(
        self,
        kv_capacity: int | None,
        num_threads: int | None,
        prefill_chunk: int,
        int8_activations: bool,
    ) -> Backend:
        from .backends.ort import OrtBackend

        return OrtBackend(
            self.bundle,
            self.manifest,
            kv_capacity=kv_capacity,
            num_threads=num_threads,
            max_step_tokens=prefill_chunk,
            int8_activations=int8_activations,
        )


def _is_ids(prompt: Prompt) -> TypeGuard[Sequence[int]]:
    # A numpy integer is an Integral, but no int.
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Integral)


class _Exclusive:
    """Holds the engine for one generation; a second one is refused instead of waiting for ever."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RequestError(
                "a generation is running already on this LLM; exhaust or close its stream first"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _TextStream:
    """Token ids to text: whole characters, stop strings, then reasoning and answer apart."""

    def __init__(
        self, detokenizer: Detokenizer, stops: StopMatcher, splitter: ReasoningSplitter | None
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._splitter = splitter

    def push(self, token_id: int) -> tuple[str, str, bool]:
        """New answer text, new reasoning text, and whether a stop string was met."""
        text, stopped = self._stops.push(self._detokenizer.push(token_id))
        answer, reasoning = self._split(text)
        return answer, reasoning, stopped

    def finish(self, stopped: bool) -> tuple[str, str]:
        """What was held back; nothing beyond a stop string."""
        answer = reasoning = ""
        if not stopped:
            text, stopped = self._stops.push(self._detokenizer.flush())
            answer, reasoning = self._split(text if stopped else text + self._stops.flush())
        if self._splitter is not None:
            last_reasoning, last_answer = self._splitter.flush()
            return answer + last_answer, reasoning + last_reasoning
        return answer, reasoning

    def _split(self, text: str) -> tuple[str, str]:
        if self._splitter is None:
            return text, ""
        reasoning, answer = self._splitter.push(text)
        return answer, reasoning
