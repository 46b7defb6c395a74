"""Makes the ASGI application and decides which path leads to which endpoint."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router

from .api.answers import LoadResponse, ModelCard, ModelList, ModelState
from .api.anthropic.errors import NAMES as MESSAGES_NAMES
from .api.anthropic.messages import MessagesRender, check_version, plan_messages
from .api.anthropic.messages import count_tokens as count_message_tokens
from .api.anthropic.protocol import CountTokensRequest, MessagesRequest
from .api.chat import ChatRender, plan_chat
from .api.completions import CompletionRender, plan_completion
from .api.error_forms import error_body
from .api.facts import TextRequest, count_tokens, facts_of
from .api.ollama.answers import VersionAnswer
from .api.ollama.embed import embed as ollama_embed
from .api.ollama.embed import embed_prompt
from .api.ollama.models import (
    API_VERSION,
    NOT_SERVED_PATHS,
    list_models,
    list_running,
    not_served,
    show_model,
)
from .api.ollama.protocol import (
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    OllamaChatRequest,
    ShowRequest,
)
from .api.ollama.text import NAMES as OLLAMA_NAMES
from .api.ollama.text import OllamaRender, is_load, loaded, plan_generate, plan_ollama_chat
from .api.openapi import openapi
from .api.other_paths import OTHER_PATHS, other_path
from .api.pooling import embed, rerank
from .api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    LoadRequest,
    RerankRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
    decode,
)
from .api.respond import Plan, Render, Turn, json_response, respond
from .api.responses.plan import NAMES as RESPONSES_NAMES
from .api.responses.protocol import ResponsesRequest
from .api.responses.stored import StoredResponses
from .api.text import detokenize, tokenize, tokenizer_info
from .http.access import APIKeys, RateLimit
from .http.errors import APIError, invalid, renamed
from .http.guard import App, Guard, Receive, Scope, Send
from .http.memory import Trimmer
from .http.page import page_files
from .http.priority import priority_of
from .http.probes import HEALTHY
from .http.threads import LARGE_BYTES, Lane, Lanes, in_thread, while_there
from .models.adapters import allowed_path, may_use
from .models.registry import Choice, ModelEntry, ModelRegistry
from .pictures import fetcher, lane_bytes, modalities, picture_models, read_long_body
from .settings import ServerSettings, parse_keep_alive

if TYPE_CHECKING:
    from edge.runtime.llm import LLM

    from .models.bundle_text import BundleText
    from .models.loader import Loader
    from .observe.metrics import Metrics

_Body = TypeVar("_Body")
_TextBody = TypeVar("_TextBody", bound=TextRequest)
Endpoint = Callable[[Request], Awaitable[Response]]
_AS_IN_CHATS: Mapping[str, str] = MappingProxyType({})


def create_app(
    models: ModelRegistry,
    settings: ServerSettings,
    metrics: Metrics,
    keys: APIKeys | None,
    arrivals: RateLimit | None = None,
    stored: StoredResponses | None = None,
    loader: Loader | None = None,
) -> App:
    """Make the application with its guard.

    Args:
        models: the models that are served.
        settings: limits of the server.
        metrics: counts requests, choices of models and rejections.
        keys: keys that clients may use; None lets everyone on this machine in.
        arrivals: limits how much one address may send.
        stored: the stored responses; None stores none.
        loader: loads and unloads models; None leaves them as they are.
    """
    stored = stored or StoredResponses(models, settings, metrics, None)
    trimmer = Trimmer()
    endpoints = _Endpoints(models, settings, metrics, stored, trimmer, loader)
    router = Router(endpoints.routes(), redirect_slashes=False)

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = router  # so that it raises instead of answering in plain text
        await router(scope, receive, send)

    return Guard(
        routed,
        settings,
        keys,
        public=frozenset(page_files()),
        is_draining=lambda: models.is_draining,
        on_rejection=metrics.observe_rejection,
        on_end=trimmer.ended,
        on_ignored_client=metrics.observe_ignored_client,
        error_body=error_body,
        arrivals=arrivals,
    )


class _Endpoints:
    def __init__(
        self,
        models: ModelRegistry,
        settings: ServerSettings,
        metrics: Metrics,
        stored: StoredResponses,
        trimmer: Trimmer,
        loader: Loader | None,
    ) -> None:
        self._models = models
        self._stored = stored
        self._loader = loader
        self._settings = settings
        self._metrics = metrics
        self._lanes = Lanes(settings, on_large=trimmer.soon)
        self._fetcher = fetcher(settings)

    def routes(self) -> list[BaseRoute]:
        """List every path; those of the API come with and without ``/v1``."""
        get: dict[str, Endpoint] = {
            **dict.fromkeys(page_files(), self._page),
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics_text,
            "/stats": self._stats,
            "/openapi.json": self._openapi,
            "/tokenizer_info": self._tokenizer_info,
        }
        both: dict[str, tuple[str, Endpoint]] = {  # paths with their methods
            "/models": ("GET", self._list_models),
            "/models/{id:path}": ("GET", self._show_model),
            "/models/load": ("POST", self._load_model),
            "/models/unload": ("POST", self._unload_model),
            "/load_lora_adapter": ("POST", self._load_adapter),
            "/unload_lora_adapter": ("POST", self._unload_adapter),
            "/chat/completions": ("POST", self._chat),
            "/completions": ("POST", self._completions),
            "/responses": ("POST", self._responses),
            "/responses/{id}": ("GET DELETE", self._stored_response),
            "/responses/{id}/cancel": ("POST", self._cancel_response),
            "/messages": ("POST", self._messages),
            "/messages/count_tokens": ("POST", self._count_tokens),
            "/embeddings": ("POST", self._embeddings),
            "/rerank": ("POST", self._rerank),
        }
        get |= {
            "/api/tags": self._ollama_models,
            "/api/ps": self._ollama_models,
            "/api/version": self._ollama_version,
        }
        post = {
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
            "/api/chat": self._ollama_chat,
            "/api/generate": self._ollama_generate,
            "/api/show": self._ollama_show,
            "/api/embed": self._ollama_embed,
            "/api/embeddings": self._ollama_embeddings,
        }
        return [
            *(Route(path, endpoint, methods=["GET"]) for path, endpoint in get.items()),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
            *(Route(path, self._not_served, methods=[method]) for path, method in NOT_SERVED_PATHS),
            *(Route(path, self._other_path, methods=["GET", "POST"]) for path in OTHER_PATHS),
            *(
                Route(prefix + path, endpoint, methods=methods.split())
                for path, (methods, endpoint) in both.items()
                for prefix in ("/v1", "")
            ),
        ]

    async def _read(self, request: Request, kind: type[_Body]) -> tuple[_Body, Lane]:
        """Read the body of a request; return it, and the lane in which to encode its texts."""
        body = await read_long_body(request, self._settings, self._models.entries())
        lane = self._lanes.lane(lane_bytes(body))
        ignores = self._settings.unknown_fields == "ignore"
        on_unknown = self._metrics.observe_ignored_fields if ignores else None
        read = partial(decode, body, kind, self._settings.max_nesting, on_unknown)
        is_long = len(body) >= LARGE_BYTES
        asked = await lane.run(lambda _: read(), request.receive) if is_long else read()
        if self._fetcher is not None:
            await self._fetcher.fetch_all(asked, request.receive)
        return asked, lane

    # ------------------------------------------------------------------------------- text

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, ChatRequest, plan_chat, ChatRender)

    async def _completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionRequest, plan_completion, CompletionRender)

    async def _responses(self, request: Request) -> Response:
        body, lane = await self._read(request, ResponsesRequest)
        previous = body.previous_response_id
        body = await self._stored.read(body, request.scope["client_identity"])
        turn = self._turn(request, await self._choose(body, lane, request), lane)
        with renamed(RESPONSES_NAMES):
            return await self._stored.respond(turn, body, previous)

    async def _stored_response(self, request: Request) -> Response:
        id_, client = request.path_params["id"], request.scope["client_identity"]
        if request.method == "DELETE":
            return await self._stored.delete(id_, client)
        return await self._stored.retrieve(id_, client, request.query_params)

    async def _cancel_response(self, request: Request) -> Response:
        client = request.scope["client_identity"]
        return await self._stored.cancel(request.path_params["id"], client)

    async def _messages(self, request: Request) -> Response:
        check_version(request.headers.get("anthropic-version"))
        return await self._generate(
            request, MessagesRequest, plan_messages, MessagesRender, MESSAGES_NAMES
        )

    async def _count_tokens(self, request: Request) -> Response:
        check_version(request.headers.get("anthropic-version"))
        body, lane = await self._read(request, CountTokensRequest)
        choice = await self._choose(body, lane, request)
        turn = self._turn(request, choice, lane)
        with choice.model.lease():
            counted = await lane.run(partial(count_message_tokens, turn, body), request.receive)
        return json_response(counted, turn.headers)

    async def _generate(
        self,
        request: Request,
        kind: type[_TextBody],
        plan: Callable[[Turn, _TextBody], Plan],
        render: Callable[[Turn, _TextBody], Render],
        names: Mapping[str, str] = _AS_IN_CHATS,
    ) -> Response:
        """Answer a request for text; ``names`` renames fields in its errors (`renamed`)."""
        body, lane = await self._read(request, kind)
        return await self._answer(request, body, lane, plan, render, names)

    async def _answer(
        self,
        request: Request,
        body: _TextBody,
        lane: Lane,
        plan: Callable[[Turn, _TextBody], Plan],
        render: Callable[[Turn, _TextBody], Render],
        names: Mapping[str, str],
    ) -> Response:
        turn = self._turn(request, await self._choose(body, lane, request), lane)
        with renamed(names):
            return await respond(turn, partial(plan, turn, body), render(turn, body))

    def _turn(self, request: Request, choice: Choice, lane: Lane) -> Turn:
        client, adapter = request.scope["client_identity"], choice.adapter
        if adapter is not None and not may_use(self._settings, client.name, adapter.name):
            raise self._models.not_served(f"{choice.model.name}:{adapter.name}")
        return Turn(
            model=choice.model,
            adapter=adapter,
            client=client,
            settings=self._settings,
            metrics=self._metrics,
            receive=request.receive,
            lane=lane,
            form_lane=self._lanes.forms,
            headers=choice.headers(),
            arm=choice.arm,
            priority=priority_of(request.headers.getlist("priority")),
            waited_s=choice.waited_s,
            picture_models=picture_models(self._models.entries()),
        )

    async def _embeddings(self, request: Request) -> Response:
        body, lane = await self._read(request, EmbeddingRequest)
        choice = await self._models.choose(body.model, receive=request.receive)
        return await embed(self._turn(request, choice, lane), body)

    async def _rerank(self, request: Request) -> Response:
        body, lane = await self._read(request, RerankRequest)
        choice = await self._models.choose(body.model, receive=request.receive)
        return await rerank(self._turn(request, choice, lane), body)

    async def _choose(self, body: TextRequest, lane: Lane, request: Request) -> Choice:
        counts = None
        if limits := self._models.token_limits(body.model):
            counts = await lane.run(partial(count_tokens, body, limits), request.receive)
        facts = facts_of(body, request.scope["request_id"], counts)
        keep_alive_s = self._keep_alive_s(body, request)
        choice = await self._models.choose(body.model, facts, keep_alive_s, request.receive)
        if choice.rule is not None:
            self._metrics.observe_route(choice.rule, choice.model.name)
        if choice.arm is not None:
            self._metrics.observe_arm(choice.arm, choice.model.name)
        return choice

    # ------------------------------------------------------------------------------- Ollama

    async def _ollama_chat(self, request: Request) -> Response:
        body, lane = await self._read(request, OllamaChatRequest)
        return await self._ollama(request, body, lane, plan_ollama_chat)

    async def _ollama_generate(self, request: Request) -> Response:
        body, lane = await self._read(request, GenerateRequest)
        return await self._ollama(request, body, lane, plan_generate)

    async def _ollama(
        self, request: Request, body: Any, lane: Lane, plan: Callable[[Turn, Any], Plan]
    ) -> Response:
        given = body.model
        if is_load(body):
            if body.keep_alive is not None and not _read_keep_alive(body.keep_alive):
                entry = self._models.find(given)
                await self._unload(entry, request)
                return json_response(loaded(given or entry.name, body, "unload"))
            choice = await self._choose(body, lane, request)
            return json_response(loaded(given or choice.model.name, body, "load"))

        def render(turn: Turn, body: Any) -> Render:
            return OllamaRender(turn, body, given)

        return await self._answer(request, body, lane, plan, render, OLLAMA_NAMES)

    async def _ollama_show(self, request: Request) -> Response:
        body, _ = await self._read(request, ShowRequest)
        entry = self._models.find(body.model or body.name or None)
        return json_response(show_model(entry, await self._text_of(entry, request)))

    async def _ollama_embed(self, request: Request) -> Response:
        body, lane = await self._read(request, EmbedRequest)
        stay_s = self._keep_alive_s(body, request)
        choice = await self._models.choose(body.model, None, stay_s, request.receive)
        return await ollama_embed(self._turn(request, choice, lane), body)

    async def _ollama_embeddings(self, request: Request) -> Response:
        body, lane = await self._read(request, EmbeddingsRequest)
        stay_s = self._keep_alive_s(body, request)
        choice = await self._models.choose(body.model, None, stay_s, request.receive)
        with renamed({"input": "prompt"}):
            return await embed_prompt(self._turn(request, choice, lane), body)

    async def _ollama_models(self, request: Request) -> Response:
        listing = list_running if request.scope["path"] == "/api/ps" else list_models
        return json_response(listing(self._models.entries()))

    def _keep_alive_s(self, body: object, request: Request) -> float | None:
        """Return how long a request of Ollama's API wants its model to stay, if it may say so.

        Raises:
            APIError: 400, it is not a time.
        """
        given = getattr(body, "keep_alive", None)
        seconds = None if given is None else _read_keep_alive(given)
        return seconds if request.scope["is_admin"] else None

    async def _ollama_version(self, request: Request) -> Response:
        return json_response(VersionAnswer(API_VERSION))

    async def _not_served(self, request: Request) -> Response:
        raise not_served(request.scope["path"])

    async def _other_path(self, request: Request) -> Response:
        raise other_path(request.scope["path"])

    # ------------------------------------------------------------------------------- tokens

    async def _tokenize(self, request: Request) -> Response:
        body, lane = await self._read(request, TokenizeRequest)
        model = (await self._models.choose(body.model, receive=request.receive)).model
        with model.lease():
            return json_response(
                await lane.run(partial(tokenize, body, model, self._settings), request.receive)
            )

    async def _detokenize(self, request: Request) -> Response:
        body, lane = await self._read(request, DetokenizeRequest)
        model = (await self._models.choose(body.model, receive=request.receive)).model
        with model.lease():
            return json_response(await lane.run(lambda _: detokenize(body, model), request.receive))

    async def _tokenizer_info(self, request: Request) -> Response:
        entry = self._models.find(request.query_params.get("model"))
        return json_response(tokenizer_info(await self._text_of(entry, request)))

    async def _text_of(self, entry: ModelEntry, request: Request) -> LLM | BundleText:
        """Return what a bundle has for texts, without loading the model."""
        if entry.served is not None:
            return entry.served.llm
        lane = self._lanes.lane(LARGE_BYTES)  # a tokenizer may take seconds to read
        return await lane.run(lambda _: entry.text(), request.receive)

    # ------------------------------------------------------------------------------- models

    async def _list_models(self, request: Request) -> Response:
        return json_response(ModelList(self._cards(request)))

    async def _show_model(self, request: Request) -> Response:
        if not request.path_params["id"]:
            return await self._list_models(request)
        name = self._models.without_tag(request.path_params["id"])
        for card in self._cards(request):
            if card.id == name:
                return json_response(card)
        return json_response(_card(self._models.entry(request.path_params["id"])))  # raises

    async def _load_model(self, request: Request) -> Response:
        body, _ = await self._read(request, LoadRequest)
        loader, entry = self._may_load(request), self._models.by_hand(body.model)
        await while_there(loader.load(entry), request.receive)
        if entry.served is not None:
            entry.served.touch()
        return json_response(LoadResponse())

    async def _unload_model(self, request: Request) -> Response:
        body, _ = await self._read(request, LoadRequest)
        loader, entry = self._may_load(request), self._models.by_hand(body.model)
        if not await loader.unload(entry):
            raise APIError(
                409,
                "model_busy",
                f"requests run on the model {entry.name!r}; try again when they are done",
                retry_after_s=5,
            )
        return json_response(LoadResponse())

    async def _load_adapter(self, request: Request) -> Response:
        body, _ = await self._read(request, LoadAdapterRequest)
        entry = self._with_adapters(body.model, request)
        path, adapters = allowed_path(self._settings, body.lora_path), self._models.adapters
        load = partial(adapters.load, entry, body.lora_name, path, replace=body.load_inplace)
        await in_thread(load)
        return json_response(LoadResponse())

    async def _unload_adapter(self, request: Request) -> Response:
        body, _ = await self._read(request, UnloadAdapterRequest)
        entry = self._with_adapters(body.model, request)
        self._models.adapters.unload(entry, body.lora_name)
        return json_response(LoadResponse())

    def _with_adapters(self, name: str | None, request: Request) -> ModelEntry:
        """Return the model whose adapters an administrator changes; the only one by default."""
        self._may_load(request)
        entries = self._models.entries()
        return entries[0] if name is None and len(entries) == 1 else self._models.find(name)

    async def _unload(self, entry: ModelEntry, request: Request) -> None:
        """Unload a model now, or after its last request."""
        if not await self._may_load(request).unload(entry) and entry.served is not None:
            entry.served.keep_alive_s = 0.0

    def _may_load(self, request: Request) -> Loader:
        """Return the loader of models, for a client that may use it.

        Raises:
            APIError: 403, this client may not; or 503, models cannot be loaded by hand now.
        """
        if not request.scope["is_admin"]:
            raise APIError(
                403,
                "not_admin",
                "this client may not load and unload models; the operator can name its API key in "
                "admin_keys (without API keys, programs on the server's own machine may, if they "
                "use no proxy)",
            )
        if self._loader is None or self._models.is_loading:
            raise APIError(
                503, "loading", "models are not loaded by hand now; try again", retry_after_s=5
            )
        return self._loader

    def _cards(self, request: Request) -> list[ModelCard]:
        """Describe the models, the aliases of open models, and the adapters."""
        cards = list(map(_card, self._models.entries()))
        if not self._models.is_loading:
            first, least = cards[0].created, min(card.max_model_len for card in cards)
            reasons = all(card.reasons is True for card in cards if card.task == "generate")
            cards += [
                ModelCard(name, first, least, reasons=reasons) for name in self._models.aliases()
            ]
        client = request.scope["client_identity"].name
        cards += [
            ModelCard(f"{each.name}:{name}", each.created, each.kv_capacity, parent=each.name)
            for each in self._models.entries()
            for name in self._models.adapters.names(each)
            if may_use(self._settings, client, name)
        ]
        return cards

    # ------------------------------------------------------------------------------- state

    async def _health(self, request: Request) -> Response:
        return json_response(HEALTHY)

    async def _ready(self, request: Request) -> Response:
        return json_response(self._models.readiness())

    async def _metrics_text(self, request: Request) -> Response:
        from .observe.metric_families import CONTENT_TYPE

        text = await in_thread(self._metrics.render)
        return Response(text, headers={"content-type": CONTENT_TYPE, "cache-control": "no-store"})

    async def _stats(self, request: Request) -> Response:
        return json_response(await in_thread(self._metrics.stats_json))

    async def _openapi(self, request: Request) -> Response:
        return json_response(openapi())

    async def _page(self, request: Request) -> Response:
        file = page_files()[request.scope["path"]]
        if file.is_known(request.headers.get("if-none-match")):
            return Response(status_code=304, headers=file.headers)
        return Response(file.body, headers=file.headers)


def _read_keep_alive(given: str | float) -> float:
    """Read a field ``keep_alive``; infinity keeps the model forever.

    Raises:
        APIError: 400, it is not a time.
    """
    try:
        return parse_keep_alive(given)
    except ValueError as error:
        raise invalid(f"keep_alive: {error}", "keep_alive") from None


def _card(entry: ModelEntry) -> ModelCard:
    task = entry.manifest.model.task
    card = ModelCard(entry.name, entry.created, entry.kv_capacity, task=task)
    card.size_bytes, card.status = entry.size_bytes, ModelState(entry.status)
    if entry.status == "failed":
        card.status.failed = APIError(503, "load_failed", entry.failed or "").shown
    if task == "generate":
        own = msgspec.to_builtins(entry.manifest.sampling)
        del own["assumed"]
        card.sampling, card.reasons = own, entry.reasons
        card.architecture = modalities(entry.manifest)
    return card
