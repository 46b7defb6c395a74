"""Answers paths of other servers that do not exist here with the path to use instead."""

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
    # FastAPI, and so vLLM
    "/docs": "GET /openapi.json describes the API, and Swagger UI and Redoc show it",
    "/redoc": "GET /openapi.json describes the API, and Swagger UI and Redoc show it",
    "/version": "GET /stats has the version",
    # Text Generation Inference
    "/generate": "POST /v1/completions",
    "/generate_stream": "POST /v1/completions with stream",
    "/info": "GET /v1/models",
}
"""Paths of other servers, and what to use instead."""


def other_path(path: str) -> APIError:
    """Make the error for a path of `OTHER_PATHS`."""
    return APIError(404, "not_found", f"{path} is not served; instead: {OTHER_PATHS[path]}")
