"""Serves Ollama's endpoints about models: ``/api/tags``, ``/api/ps``, ``/api/show``."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import msgspec

from edge.errors import RequestError
from edge.text.fill_in_middle import fill_in_middle
from edge.text.tokenizer import Tokenizer
from edge_make.checkpoint_tensors import expected_tensors
from edge_serve.api.tool_use import call_syntax
from edge_serve.http.errors import APIError
from edge_serve.models.registry import TAG, ModelEntry, ServedModel
from edge_serve.pictures import reads_images

from .answers import ModelDetails, OllamaModel, OllamaModels, ShowAnswer
from .text import timestamp

if TYPE_CHECKING:
    from edge.runtime.llm import LLM
    from edge_serve.models.bundle_text import BundleText

API_VERSION = "0.13.4"
"""The version of Ollama whose API this is; some clients refuse servers with an older one."""

_NEVER = "9999-12-31T23:59:59Z"
_LAST_S = 250_000_000_000  # in the year 9892; a later time may not be a valid date
_NOT_SERVED = {
    "pull": "edge-llm pull MODEL on the device",
    "push": "nothing; bundles are directories, copy them",
    "create": "edge-llm export SOURCE",
    "copy": "edge-llm serve --model NAME=BUNDLE for a second name",
    "delete": "edge-llm rm NAME on the device",
    "blobs": "edge-llm export SOURCE",
}
NOT_SERVED_PATHS = (
    *((f"/api/{name}", method) for name in _NOT_SERVED for method in ("POST", "DELETE")),
    ("/api/blobs/{digest}", "POST"),
    ("/api/blobs/{digest}", "HEAD"),
)
"""Paths of Ollama's API that would change which models are served, with their methods."""


def not_served(path: str) -> APIError:
    """Make the error for a path of `NOT_SERVED_PATHS`."""
    name = path.split("/")[2]
    return APIError(
        404,
        "not_found",
        f"/api/{name} is not served: which models there are is decided where the server was "
        f"started; instead use: {_NOT_SERVED[name]}",
    )


def list_models(entries: Sequence[ModelEntry]) -> OllamaModels:
    """List models, loaded or not."""
    return OllamaModels(list(map(_describe, entries)))


def list_running(entries: Sequence[ModelEntry]) -> OllamaModels:
    """List the models that are loaded, and for how long."""
    return OllamaModels(
        [_running(entry, entry.served) for entry in entries if entry.served is not None]
    )


def show_model(entry: ModelEntry, llm: LLM | BundleText) -> ShowAnswer:
    """Describe a model by the texts in its bundle."""
    spec = llm.manifest.model
    family, attentions = spec.architecture, spec.attentions()
    sampling = msgspec.to_builtins(llm.manifest.sampling)
    del sampling["assumed"]
    sampling["repeat_penalty"] = sampling.pop("repetition_penalty")  # as a request's option
    parameters = {"num_ctx": llm.kv_capacity, **sampling}  # some clients then ask for no more
    template = llm.template.source if llm.template is not None else ""
    return ShowAnswer(
        parameters="\n".join(f"{name} {value}" for name, value in parameters.items()),
        template=template,
        details=_details(entry),
        model_info={
            "general.architecture": family,
            "general.parameter_count": _num_parameters(entry),
            f"{family}.context_length": llm.kv_capacity,
            f"{family}.embedding_length": spec.hidden_size,
            f"{family}.block_count": spec.num_layers,
            f"{family}.attention.head_count": max((part.heads for part in attentions), default=0),
            f"{family}.attention.head_count_kv": max(
                (part.kv_heads for part in attentions), default=0
            ),
        },
        capabilities=_capabilities(llm),
        modified_at=_modified_at(entry),
    )


def _capabilities(llm: LLM | BundleText) -> list[str]:
    if llm.manifest.model.task != "generate":
        return ["embedding"] if llm.manifest.model.task == "embed" else []
    found = ["completion"]
    if call_syntax(llm.template, has_tools=True) is not None:
        found.append("tools")
    if llm.reasons:
        found.append("thinking")
    if reads_images(llm.manifest):
        found.append("vision")
    if _fills_gaps(llm.tokenizer):
        found.append("insert")
    return found


def _fills_gaps(tokenizer: Tokenizer) -> bool:
    try:
        fill_in_middle(tokenizer)
    except RequestError:
        return False
    return True


def _describe(entry: ModelEntry) -> OllamaModel:
    manifest = entry.manifest
    # Older versions of Open WebUI look for the name with a tag here, even if they sent none.
    name = entry.name if ":" in entry.name else entry.name + TAG
    return OllamaModel(
        name=name,
        model=name,
        modified_at=_modified_at(entry),
        size=entry.size_bytes,
        digest=manifest.self_sha256,
        details=_details(entry),
    )


def _running(entry: ModelEntry, model: ServedModel) -> OllamaModel:
    found = _describe(entry)
    found.size_vram = 0 if model.llm.backend.name == "ort-cpu" else found.size
    found.context_length = model.llm.kv_capacity
    found.expires_at = _NEVER
    if math.isfinite(model.expires_s):
        at = min(time.time() + model.expires_s - time.monotonic(), _LAST_S)
        found.expires_at = timestamp(datetime.fromtimestamp(at, timezone.utc))
    return found


def _details(entry: ModelEntry) -> ModelDetails:
    manifest = entry.manifest
    family = manifest.model.architecture
    size = f"{_num_parameters(entry) / 1e9:.2f}B"
    return ModelDetails(family, [family], size, manifest.quantization.name)


def _num_parameters(entry: ModelEntry) -> int:
    """Count the numbers of the model's tensors."""
    return sum(map(math.prod, expected_tensors(entry.manifest.model).values()))


def _modified_at(entry: ModelEntry) -> str:
    return timestamp(datetime.fromtimestamp(entry.created, timezone.utc))
