"""Defines `LLM`: a bundle opened for use, text in and text out, many answers at once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from edge.backends import Backend
from edge.backends.choose import open_backend, serial_slots, tries_gpu, unused_gpu
from edge.bundle.embeddings import EMBEDDINGS_NAME, PICTURE_IDS, EmbeddingTable
from edge.bundle.manifest import MANIFEST_NAME, Manifest, decode_manifest, read_manifest_bytes
from edge.bundle.tasks import check_task
from edge.bundle.trust import check_trusted
from edge.bundle.verified_files import VerifiedFiles, check_listed
from edge.engine_config import EngineConfig, EngineOptions
from edge.errors import ConfigError, ContextLengthError, EdgeError, RequestError
from edge.text.begun_answer import BegunAnswer, take_begun_answer
from edge.text.chat_template import encode_chat
from edge.text.reasoning import THINK_END, ReasoningSplitter, prompt_opens_reasoning
from edge.text.streamed_text import Detokenizer

from .ask import AnswerOptions, Ask, is_ids
from .ask import Prompt as Prompt
from .open_bundle import find_bundle, open_bundle
from .sampling import SampledToken
from .sampling_params import SamplingParams
from .scheduler import Constraint, Overflow, PrefixSource, Request, Scheduler, Suspended
from .stream import Generation, GenerationChunk, GenerationResult, OutputStream, join_chunks, submit

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edge.adapters.loaded import Adapters
    from edge.adapters.weights import AdapterWeights
    from edge.votes.tally import VoteResult

    from .draft_model import DraftBundle
    from .eagle3 import Head
    from .scheduler.drafter import Drafter
    from .structured_output import GrammarCompiler

Params = SamplingParams | None
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


class LLM:
    """An open bundle. Use it as a context manager; any thread may call it.

    Many answers are computed at once, batched over the slots of the cache
    (`edge.runtime.scheduler`); a request that finds no slot waits in a queue. Sampling depends only
    on the request, and a draft is taken only if it equals the token that would have been sampled.
    But engines may compute a token's logits differently with other tokens in the step (batch,
    drafts). With float activations the last bits differ; with ``int8_activations`` on the CPU the
    texts of two runs can differ (docs/serving-core.md says when). ``deterministic`` makes the CPU
    compute them alike.

    Args:
        bundle: directory that ``edge-llm export`` wrote; or its name, or some words of it, as
            `edge.bundle.library.find_bundle` finds bundles for the command line. The same holds
            for ``draft``.
        config: options of the engine; None is `EngineConfig` with its defaults.
        **options: fields of `EngineConfig` that differ from ``config``, e.g.
            ``kv_capacity=4096``.

    Attributes:
        bundle: directory of the bundle.
        config: options with which it was opened.
        manifest: manifest of the bundle.
        tokenizer: the model's tokenizer.
        template: the model's chat template; None if it has none.
        reasons: whether answers to chats may begin with reasoning, which is split off.
        backend: the engine; only `call` may use it.
        draft_manifest: manifest of the bundle, or of the head, that drafts; None without one.
        warning: why the CPU computes on a machine with a GPU although nobody requested it, or
            why sequences take turns in an engine that was built for fewer; else None.
        embeddings: the token table.
        scheduler: the queue of requests and the thread that runs them.
        stop_counts: counts for `Ask.stop_when_sure`: trials that were ``tried``, that found
            ``no_slot`` or were ``too_expensive``, and thoughts that were ``stopped``.
        pools: whether the bundle embeds or judges documents, and generates nothing.

    Raises:
        IntegrityError: a file of the bundle is damaged, or the bundle is signed with a key that
            is not trusted; no parser has seen it, and nothing was answered with it.
        ConfigError: an option is unknown, or `EngineConfig` or the engine refuses a value.
        BundleError: the bundle is missing, incomplete, not signed where it must be, or has no
            engine that runs here.
        DependencyError: a library that the backend needs is missing or too old.
        BackendError: the engine cannot be opened.
    """

    def __init__(
        self,
        bundle: str | Path,
        config: EngineConfig | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        self.bundle = find_bundle(bundle)
        self.config = config = _settled(config, options)
        data = read_manifest_bytes(self.bundle)
        check_trusted(data, self.bundle, config.trusted_keys)  # before anything parses it
        self.manifest = decode_manifest(data, str(self.bundle / MANIFEST_NAME))
        self.pools = self.manifest.model.task != "generate"
        if self.pools:
            _check_pooling(config, self.manifest)
        if config.image_tiles is not None and not self.reads_images:
            raise ConfigError(f"{self.manifest.name} reads text only; leave image_tiles out")
        if config.backend != "ort-cpu":
            check_listed(self.bundle, self.manifest, self.manifest.graphs.decoder)
        with open_bundle(self.bundle, self.manifest) as opened:
            self.tokenizer, self.template = opened.tokenizer, opened.template
            self.reasons = opened.reasons
            self._open(opened.files, config)

    def _open(self, files: VerifiedFiles, config: EngineConfig) -> None:
        draft = self._read_draft(files, config)
        self.draft_manifest = None if draft is None else draft.manifest
        if tries_gpu(self.bundle, config):
            files.finish()
        with ExitStack() as engines:
            try:
                self.backend: Backend = open_backend(
                    self.bundle, self.manifest, config, self.draft_manifest
                )
            except EdgeError:
                files.finish()  # if a file is damaged, that explains the error
                raise
            engines.callback(self.backend.close)
            # Graph and weights are opened once more by their paths.
            files.check_unchanged()
            table = self.bundle / EMBEDDINGS_NAME, files.descriptor(EMBEDDINGS_NAME)
            self._encode_chat: Callable[..., list[int]] = encode_chat
            if not self.reads_images:
                self.embeddings = EmbeddingTable(*table)
            else:
                from edge.vision.prompt import PictureReader

                pictures = PictureReader(table, self.manifest, self.backend, config, self.template)
                self.embeddings, self._encode_chat = pictures.table, pictures.encode_chat
            engines.callback(self.embeddings.close)
            self._draft_model = (
                None if draft is None else draft.open(self.backend, self.embeddings, config)
            )
            if self._draft_model is not None:
                engines.callback(self._draft_model.close)
            self.scheduler = Scheduler(
                self.backend,
                self.embeddings,
                self.manifest.model.vocab_size,
                config,
                overflow=self._overflow(config.overflow),
                drafter=self._draft_model or _ngrams(config.speculative),
                prefix_store=self._stored_prefixes(config.prefix_dir),
                pools=self.pools,
            )
            self._engines = engines.pop_all()
        self.stop_counts: Counter[str] = Counter()
        self.warning = unused_gpu(self.backend.name, config)
        if (serial := serial_slots(self.backend, config)) is not None:
            _log.warning("%s", serial)
            self.warning = serial

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Return the compiler of answers' forms, which keeps those that it has compiled."""
        from .structured_output import GrammarCompiler

        return GrammarCompiler(self.tokenizer, self.manifest.model.vocab_size)

    @cached_property
    def adapters(self) -> Adapters:
        """Return the adapters that answers may request by name (`AnswerOptions.adapter`)."""
        from edge.adapters.loaded import Adapters

        return Adapters(self.bundle, self.manifest, self.backend.name, self.config.trusted_keys)

    def adapter_of(self, ask: Ask) -> AdapterWeights | None:
        """Find the adapter that a request names, by `Adapters.find`."""
        return self.adapters.find(ask.adapter) if isinstance(ask.adapter, str) else ask.adapter

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Load an adapter as ``peft`` saves it, by `Adapters.load`; returns its name.

        Raises:
            ConfigError: the bundle takes no adapters, or the name is invalid.
            CheckpointError: the adapter does not fit the bundle.
        """
        return self.adapters.load(Path(path), name)

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter that `load_adapter` loaded; running answers keep it until they end.

        Raises:
            RequestError: there is no loaded adapter of this name.
        """
        self.adapters.unload(name)

    @property
    def reads_images(self) -> bool:
        """Whether messages may have pictures."""
        return "vision" in self.manifest.extras

    @property
    def kv_capacity(self) -> int:
        """Return how many tokens prompt and answer may take together."""
        return self.backend.capacity

    @property
    def cached_tokens(self) -> int:
        """Return the number of tokens whose keys and values are in the cache now."""
        stats = self.scheduler.stats()
        return stats.kv_used_tokens + stats.kv_cached_tokens

    def encode(
        self,
        prompt: Prompt,
        *,
        suffix: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        continue_final_message: bool = False,
        max_tokens: int | None = None,
        on_piece: Callable[[], None] | None = None,
    ) -> list[int]:
        """Encode a prompt, with the begin token if the model wants one.

        Plain text never becomes a control token. Token ids stay as they are. Messages go through
        the bundle's chat template.

        Args:
            prompt: plain text, token ids or messages.
            suffix: text that comes after the answer: the model fills the gap between ``prompt``, a
                plain text, and this one. Either may be empty.
            tools: JSON schemas of functions that the model may call; for messages only.
            thinking: false ends the reasoning before it begins, true turns it on if the template's
                default is off; for messages only.
            continue_final_message: whether the last message is the assistant's and the answer
                continues it (`take_begun_answer`). If its text has begun, the model does not reason
                any more. For messages only.
            max_tokens: refuse, before encoding, a prompt that surely has more tokens.
            on_piece: called before each piece of a long text, as in `Tokenizer.encode`.

        Raises:
            ContextLengthError: the prompt surely has more than ``max_tokens``.
            RequestError: a message is malformed; the bundle has no template for messages; this
                prompt or template does not support an option; the last message cannot be continued;
                or the model has no tokens for a suffix.
        """
        ask = Ask(prompt, None, suffix, tools, thinking, continue_final_message)
        return self.encode_ask(ask, max_tokens, on_piece)

    def encode_ask(
        self, ask: Ask, max_tokens: int | None, on_piece: Callable[[], None] | None = None
    ) -> list[int]:
        """Encode the prompt of an `Ask`, as `encode` does."""
        prompt, suffix, thinking = ask.prompt, ask.suffix, ask.thinking
        if suffix is not None and not isinstance(prompt, str):
            raise RequestError("suffix: belongs to a plain text, not to chat messages or token ids")
        if isinstance(prompt, str) or is_ids(prompt):
            if ask.tools or thinking is False or ask.continue_final_message:
                raise RequestError(
                    "tools, thinking and continue_final_message belong to chat messages; this "
                    "prompt is plain text or ids"
                )
            if isinstance(prompt, str):
                if max_tokens is not None:
                    least = sum(map(self.tokenizer.least_tokens, (prompt, suffix or "")))
                    if least > max_tokens:
                        raise ContextLengthError(least, max_tokens, at_least=True)
                if suffix is not None:
                    from edge.text.fill_in_middle import fill_in_middle

                    fill = fill_in_middle(self.tokenizer)
                    return fill.encode(self.tokenizer, prompt, suffix, on_piece)
                add_bos = self.manifest.tokens.add_bos
                return self.tokenizer.encode(prompt, add_bos=add_bos, on_piece=on_piece)
            return _token_ids(prompt)
        given: object = prompt
        if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
            raise RequestError(
                "a prompt is a text, a list of chat messages or a list of token ids, "
                f"not {type(given).__name__}"
            )
        if self.template is None:
            raise RequestError(
                "this bundle has no chat template, so it takes plain text only; pass a string"
            )
        messages = cast(Sequence[Mapping[str, Any]], prompt)
        begun = None
        if ask.continue_final_message:
            messages, begun = take_begun_answer(messages, reasons=self.reasons)
            if begun.place == "reasoning" and thinking is False:
                raise RequestError(
                    "thinking: is off, and the answer to continue is in its reasoning; close that "
                    f"with {THINK_END}, or leave thinking on"
                )
            if begun.place == "text":
                thinking = bool(begun.reasoning)
        options: dict[str, Any] = {}
        if thinking is not None and "enable_thinking" in self.template.variables:
            options["enable_thinking"] = thinking
        if thinking is False and not options and (begun is None or begun.place == "start"):
            begun = BegunAnswer(place="text")  # closes a reasoning that the template opens
        return self._encode_chat(
            self.tokenizer,
            self.template,
            messages,
            tools=ask.tools,
            begun=begun,
            max_tokens=max_tokens,
            on_piece=on_piece,
            **options,
        )

    @overload
    def submit(
        self, prompt: Prompt, params: Params = None, **options: Unpack[AnswerOptions]
    ) -> Generation: ...

    @overload
    def submit(
        self, prompt: Prompt, params: Params = None, *, n: int, **options: Unpack[AnswerOptions]
    ) -> list[Generation]: ...

    def submit(
        self, prompt: Prompt, params: Params = None, *, n: int | None = None, **options: Any
    ) -> Generation | list[Generation]:
        """Queue answers to a prompt, which share its rows of the cache; returns at once.

        Reasoning is split off for chats only; otherwise text comes back as the model wrote it.

        Args:
            prompt: plain text, token ids or messages.
            params: sampling; a value that is None comes from the bundle. Sample ``i`` has the seed
                plus i.
            n: number of samples; None is one.
            **options: options of the answer, as in `AnswerOptions`.

        Returns:
            The answer that is coming; a list of answers if ``n`` is given, even 1.

        Raises:
            RequestError: the prompt, an option, parameter, output format or budget is wrong, or an
                answer to continue breaks the output format.
            DependencyError: an output format is given and llguidance is missing.
            ContextLengthError: the prompt does not fit into the cache.
            OverloadError: the queue is full, and no other client has more in it.
            BackendError: the engine cannot run any more, or the LLM is closed.
        """
        _check_options(options)
        answers = self.answer(Ask(prompt, params, **options), 1 if n is None else n)
        return answers[0] if n is None else answers

    def answer(self, ask: Ask, n: int = 1) -> list[Generation]:
        """Queue ``n`` answers to an `Ask`, as `submit` does."""
        check_task(self.manifest, "generate")
        submit_all: Callable[..., list[Generation]] = submit
        if ask.vote is not None:
            from .vote import voting

            ask, n, submit_all = voting(ask, n)
        self.scheduler.check_count(n)
        if ask.resumed is not None and n > 1:
            raise RequestError("n must be 1 when a suspended answer is resumed")
        ids = self.encode_ask(ask, self.kv_capacity) if ask.ids is None else ask.ids
        begun = BegunAnswer()
        if ask.continue_final_message:
            chat = cast(Sequence[Mapping[str, Any]], ask.prompt)
            _, begun = take_begun_answer(chat, reasons=self.reasons)
        resolved = self._resolve(ask.params)
        end_ids = self._end_ids(resolved)
        if ask.suffix is not None and not resolved.ignore_eos:
            from edge.text.fill_in_middle import fill_in_middle

            end_ids |= fill_in_middle(self.tokenizer).ends
        may_reason = self.reasons and ask.is_chat
        reasons = may_reason and ask.thinking is not False
        budget = ask.thinking_budget
        if budget is not None and not reasons:
            raise RequestError(
                "a thinking budget needs a chat of a model that reasons, with thinking left on"
            )
        if begun.place == "text":
            may_reason, reasons, budget = False, False, None  # the reasoning is over
        elif budget is not None and begun.reasoning:
            used = len(self.tokenizer.encode(begun.reasoning))
            budget = max(0, budget - used)
        if ask.output is not None:
            from .structured_output import OutputFormat

            given: object = ask.output
            if not isinstance(given, OutputFormat):
                raise RequestError(
                    'output must be an OutputFormat, e.g. OutputFormat("json_schema", schema), '
                    f"not {type(given).__name__}"
                )
            if resolved.ignore_eos:
                raise RequestError("an output format ends with an end token; do not set ignore_eos")
        streams = [self._output_stream(ask, ids, resolved, begun) for _ in range(n)]
        if may_reason and ask.thinking is False and ask.output is None:
            # The model may open a reasoning that its template does not; a form has no place for it.
            reasons, budget = True, 0
        request = Request(
            ids=tuple(ids),
            params=resolved,
            end_ids=end_ids,
            priority=ask.priority,
            client=ask.client,
            deadline_s=ask.deadline_s,
            salt=ask.salt,
            adapter=self.adapter_of(ask),
            wants_progress=ask.progress,
            resume_from=ask.resumed,
            pictures=getattr(ids, "pictures", ()),
        )
        requests = [
            replace(each, constraint=self._constrain(ask, each, begun, budget, reasons))
            for each in map(request.sample, range(n))
        ]
        for token_id in () if ask.resumed is None else ask.resumed.answer:
            streams[0].push(SampledToken(token_id), None)
            if (constraint := requests[0].constraint) is not None:
                constraint.accept(token_id)
        return submit_all(self.scheduler, requests, streams)

    def suspend(
        self, generations: Sequence[Generation], timeout_s: float
    ) -> list[Suspended | None]:
        """Take answers out, so that `submit` can continue them later, also in another process.

        Each ends as if it were cancelled. `Scheduler.suspend` has the details.

        Args:
            generations: answers from `submit`, waiting or running.
            timeout_s: seconds to wait for the engine.

        Returns:
            For each, in order, the state from which it continues; None if it has ended.

        Raises:
            RequestError: one of them is a vote; none is suspended then.
            BackendError: the engine failed, or ended no step in this time.
        """
        return self.scheduler.suspend([each.to_suspend() for each in generations], timeout_s)

    def stream(
        self, prompt: Prompt, params: Params = None, **options: Unpack[AnswerOptions]
    ) -> Generator[GenerationChunk, None, None]:
        """Generate text piece by piece; closing the stream ends the generation.

        Generation starts when the first piece is requested.

        Args:
            prompt: plain text, token ids or messages, as in `submit`.
            params: sampling, as in `submit`.
            **options: further arguments of `submit`, except ``n``.

        Raises:
            EdgeError: any error of `submit` or of iterating over a `Generation`.
        """
        if "n" in options:
            raise RequestError("a stream is one answer; submit gives n of them")
        _check_options(options)
        return self._stream(Ask(prompt, params, **options))

    def generate(
        self, prompt: Prompt, params: Params = None, **options: Unpack[AnswerOptions]
    ) -> GenerationResult:
        """Generate a whole answer, with the arguments and errors of `stream`."""
        return join_chunks(self.stream(prompt, params, **options))

    def generate_best(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        best_of: int,
        n: int = 1,
        rank_by: Literal["mean", "sum"] = "mean",
        **options: Unpack[AnswerOptions],
    ) -> list[GenerationResult]:
        """Generate ``best_of`` answers and return the ``n`` most probable, the best first.

        Args:
            prompt: plain text, token ids or messages, as in `submit`.
            params: sampling, as in `submit`.
            **options: options of the answer, as in `submit`.
            best_of: answers to generate, at least ``n``.
            n: answers to return.
            rank_by: an answer's score is the mean or the sum of the log-probabilities of its
                tokens, without the end token. The sum favours short answers; an answer without any
                token comes last.

        Raises:
            EdgeError: any error of `stream`.
        """
        from .best_of import best_of as choose

        return choose(self.submit, prompt, params, best_of, n, rank_by, options)

    def vote(
        self, prompt: Prompt, params: Params = None, **options: Unpack[AnswerOptions]
    ) -> VoteResult:
        """Draw samples until one answer has won; docs/vote.md explains it.

        Args:
            prompt: plain text, token ids or messages, as in `submit`.
            params: sampling, as in `submit`; the temperature must be above 0.
            **options: options of the answer, as in `submit`. ``vote`` says what an answer is, how
                many samples there may be and how sure the winner must be. By default the final
                number wins, with at most 8 samples.

        Raises:
            EdgeError: any error of `stream`.
        """
        from edge.votes.tally import VoteRule

        options.setdefault("vote", VoteRule())
        return cast("VoteResult", list(self.stream(prompt, params, **options))[-1].vote)

    def generate_ids(
        self, ids: Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[int]:
        """Generate token ids from token ids; the end token is not yielded.

        Raises:
            RequestError: `submit` refuses the request, or ``params`` has stop strings, which need
                text.
        """
        check_task(self.manifest, "generate")
        resolved = self._resolve(params)
        if resolved.stop:
            raise RequestError("generate_ids works without text; use stop_token_ids, not stop")
        request = Request(
            ids=tuple(_token_ids(ids)), params=resolved, end_ids=self._end_ids(resolved)
        )
        chunks = _read(submit(self.scheduler, [request], [OutputStream()])[0])
        return (token.id for chunk in chunks for token in chunk.tokens)

    def score(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """Compute the log-probability of every token but the first, by `scoring.score`.

        The call waits until no answer is being computed.

        Returns:
            Natural logarithms, float64 ``[len(ids) - 1]``.

        Raises:
            RequestError: there are fewer than two tokens, or one is not an id of the token table.
            ContextLengthError: there are more tokens than the cache holds.
            BackendError: the engine failed, or its logits are not finite.
        """
        from .scoring import score

        check_task(self.manifest, "generate")
        tokens = _token_ids(ids)
        return self.call(
            lambda: score(self.backend, self.embeddings, tokens, self.scheduler.report_step)
        )

    def embed(
        self,
        texts: str | Sequence[str | Sequence[int]],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
    ) -> NDArray[np.float32]:
        """Turn texts into vectors, with a bundle that embeds (docs/embeddings.md).

        Args:
            texts: texts, or lists of token ids; one text is a list of one.
            prompt_name: name of the model's prompt to put before each text, e.g. ``query``; None is
                its default one, mostly none.
            prompt: a prompt of your own instead.
            dimensions: number of leading dimensions to keep, if the model allows it.

        Returns:
            One vector per text, in order, float32 ``[n, dimensions]``; normalized if the model says
            so.

        Raises:
            RequestError: the bundle does not embed, a text is missing or empty, the prompt is
                unknown, or the model does not allow the dimensions.
            ContextLengthError: a text does not fit into the cache; none has run.
            OverloadError: the scheduler drains.
            BackendError: the engine failed, or its output is not finite.
        """
        from .embedding import EmbeddingReader, run

        reader = EmbeddingReader(self.manifest, self.tokenizer)
        reader.check_dimensions(dimensions)
        if prompt is not None and prompt_name is not None:
            raise RequestError("give prompt or prompt_name, not both")
        before = reader.prompt(prompt_name) if prompt is None else prompt
        given = [texts] if isinstance(texts, str) else texts
        if len(given) == 0:
            raise RequestError("there is no text; give at least one")
        most = self.kv_capacity
        ids = [reader.encode(each, before, max_tokens=most) for each in given]
        return reader.finish(run(self.scheduler, ids, most), dimensions)

    def rerank(
        self, query: str, documents: Sequence[str], *, instruction: str | None = None
    ) -> NDArray[np.float32]:
        """Judge how well documents answer a query, with a bundle that judges documents.

        Args:
            query: the question.
            documents: the texts to judge.
            instruction: how to judge; None is the model's own instruction.

        Returns:
            The probability of yes against no for each document, in order, float32 ``[n]``.

        Raises:
            RequestError: the bundle does not judge documents, or a text is missing or empty.
            ContextLengthError: query and document do not fit into the cache; none has run.
            OverloadError: the scheduler drains.
            BackendError: the engine failed, or its output is not finite.
        """
        from .embedding import DocumentJudge, run

        judge = DocumentJudge(self.manifest, self.tokenizer)
        if isinstance(documents, str) or len(documents) == 0:
            raise RequestError("documents: give a list of at least one text")
        most = self.kv_capacity
        ids = [judge.encode(query, each, instruction, max_tokens=most) for each in documents]
        return judge.scores(run(self.scheduler, ids, most))

    def call(self, work: Callable[[], _Result]) -> _Result:
        """Run ``work`` while no answer is being computed, and return its result.

        Only ``work`` may use `backend` directly. Cached prefixes are dropped.
        """
        return self.scheduler.call(work)

    def close(self) -> None:
        """Cancel running answers, free the engine and close files; calling it twice is harmless."""
        self.scheduler.close()
        self._engines.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _stream(self, ask: Ask) -> Generator[GenerationChunk, None, None]:
        yield from _read(self.answer(ask)[0])

    def _output_stream(
        self, ask: Ask, ids: Sequence[int], params: SamplingParams, begun: BegunAnswer
    ) -> OutputStream:
        splitter = None
        if ask.is_chat and self.reasons and begun.place != "text":
            opened = begun.place == "reasoning" or self._opens_reasoning(ids)
            splitter = ReasoningSplitter(opened, goes_on=bool(begun.reasoning))
        # In free text a sentencepiece vocabulary's first space does not count; in a form it does.
        has_form = ask.output is not None and ask.output.kind != "tool_calls"
        goes_on = not ask.is_chat or has_form or bool(begun.content or begun.reasoning)
        detokenizer = Detokenizer(self.tokenizer, goes_on=goes_on)
        return OutputStream(detokenizer, params.stop, splitter)

    def _constrain(
        self, ask: Ask, request: Request, begun: BegunAnswer, budget: int | None, reasons: bool
    ) -> Constraint | None:
        """Make a constraint: reasoning first, within its budget, then the output format."""
        until_sure = ask.stop_when_sure or self.config.stop_when_sure
        if ask.output is None and budget is None and not until_sure:
            return None
        answer: Constraint | None = None
        if ask.output is not None:
            answer = self.grammars.compile(ask.output)
            for token_id in self.tokenizer.encode(begun.content, goes_on=True):
                answer.accept(token_id)
        opened = begun.place == "reasoning" or self._opens_reasoning(request.ids)
        if until_sure:
            from .stop_when_sure import until_sure as watch

            return watch(self, ask, request, opened, budget, answer, reasons=reasons)
        if not reasons:
            return answer
        from .thinking import ThinkingBudget

        size = self.manifest.model.vocab_size
        return ThinkingBudget(self.tokenizer, size, opened=opened, budget=budget, answer=answer)

    def _read_draft(self, files: VerifiedFiles, config: EngineConfig) -> DraftBundle | Head | None:
        if config.draft is None:
            return None
        if config.drafts_with_head:
            from .eagle3 import read_head

            return read_head(self.bundle, self.manifest, files)
        from .draft_model import read_draft

        vocab_size = self.manifest.model.vocab_size
        return read_draft(config.draft, self.bundle, vocab_size, config.trusted_keys)

    def _overflow(self, kind: Literal["stop", "slide"]) -> Overflow | None:
        if kind == "stop":
            return None
        from .overflow import SlidingWindow

        return SlidingWindow(self.manifest.model)

    def _stored_prefixes(self, directory: Path | None) -> PrefixSource | None:
        if directory is None:
            return None
        from .prefix_store import Layout, PrefixStore

        layout, scales = Layout.of(self.backend), self.backend.kv_scales
        return PrefixStore(directory, self.manifest, layout, scales=scales)

    def _opens_reasoning(self, ids: Sequence[int]) -> bool:
        last = [id_ for id_ in ids[-8:] if id_ < PICTURE_IDS]
        return prompt_opens_reasoning(self.tokenizer.decode(last))

    def _resolve(self, params: SamplingParams | None) -> SamplingParams:
        given: object = params
        if not isinstance(given, SamplingParams | None):
            raise RequestError(f"params must be SamplingParams, not {type(given).__name__}")
        return (params or SamplingParams()).resolve(self.manifest.sampling)

    def _end_ids(self, params: SamplingParams) -> frozenset[int]:
        eos = () if params.ignore_eos else self.manifest.tokens.eos
        return frozenset((*params.stop_token_ids, *eos))


def _settled(config: EngineConfig | None, options: EngineOptions) -> EngineConfig:
    """Merge both into one configuration, whose draft is a directory."""
    given: object = config
    if not isinstance(given, EngineConfig | None):
        raise ConfigError(
            f"config must be an EngineConfig, not {type(given).__name__}; options go by name, "
            "as in LLM(bundle, kv_capacity=4096)"
        )
    config = (config or EngineConfig()).with_options(**options)
    if config.draft is not None and not config.drafts_with_head:
        config = config.with_options(draft=find_bundle(config.draft))
    if config.prefix_dir is not None and not config.prefix_dir.is_dir():
        raise ConfigError(
            f"prefix_dir {config.prefix_dir} is no directory; edge-llm cache build makes it"
        )
    return config


def _ngrams(speculative: int | None) -> Drafter | None:
    if not speculative:
        return None
    from .drafts import NgramDrafter

    return NgramDrafter()


def _check_pooling(config: EngineConfig, manifest: Manifest) -> None:
    """Refuse options that make sense only for generating."""
    for option, given in (
        ("draft", config.draft is not None),
        ("speculative", bool(config.speculative)),
        ("overflow slide", config.overflow == "slide"),
        ("prefix_dir", config.prefix_dir is not None),
    ):
        if given:
            raise ConfigError(
                f"{option} is for models that generate, and {manifest.name} is to "
                f"{manifest.model.task}; leave it out"
            )


def _token_ids(ids: Sequence[int]) -> list[int]:
    found, is_text = list(ids), isinstance(ids, str | bytes | bytearray)
    if is_text or not all(isinstance(token_id, Integral) for token_id in found):
        raise RequestError("token ids are whole numbers; LLM.encode makes them of a text")
    return [int(token_id) for token_id in found]


def _check_options(options: Mapping[str, object]) -> None:
    for name in options.keys() - AnswerOptions.__annotations__.keys():
        from edge.other_names import answer_option

        known, sampling = AnswerOptions.__annotations__, [f.name for f in fields(SamplingParams)]
        instead = answer_option(name, list(known), sampling)
        raise RequestError(f"an answer has no option {name}: {instead}")


def _read(generation: Generation) -> Iterator[GenerationChunk]:
    """Iterate over a generation, and end it with the iterator."""
    try:
        yield from generation
    finally:
        generation.cancel()  # does nothing after the last piece
