"""Paths of other servers that are none here, and what is asked for there instead."""

from __future__ import annotations

from edge_serve.http.errors import APIError

OTHER_PATHS = {
    # llama.cpp's server
    "/props": "GET /v1/models has the context lengths, POST /api/show a chat template",
    "/slots": "GET /stats has what runs and what waits",
    "/completion": "POST /v1/completions",
    "/infill": "POST /v1/completions with suffix",
    "/embedding": "POST /v1/embeddings",
    "/apply-template": "POST /tokenize with messages",
    # FastAPI's, and so vLLM's
    "/docs": "GET /openapi.json describes the API, and Swagger UI and Redoc show it",
    "/redoc": "GET /openapi.json describes the API, and Swagger UI and Redoc show it",
    "/version": "GET /stats has the version",
    # of Text Generation Inference
    "/generate": "POST /v1/completions",
    "/generate_stream": "POST /v1/completions with stream",
    "/info": "GET /v1/models",
}
"""By path what to take instead."""


def other_path(path: str) -> APIError:
    """Make the answer to a path of `OTHER_PATHS`."""
    return APIError(404, "not_found", f"{path} is not served; instead: {OTHER_PATHS[path]}")
