"""Checks that a bundle's graph is used for its own task."""

from __future__ import annotations

from edge.errors import RequestError
from edge.model.spec import Task

from .manifest import Manifest

_DOES: dict[Task, str] = {
    "generate": "generates text",
    "embed": "embeds texts (LLM.embed, /v1/embeddings)",
    "rerank": "judges documents (LLM.rerank, /v1/rerank)",
}


def check_task(manifest: Manifest, task: Task) -> None:
    """Refuse to use a bundle for another task than its own.

    Raises:
        RequestError: its graph does not have the output that the task needs.
    """
    own = manifest.model.task
    if own != task:
        raise RequestError(
            f"the model {_DOES[own]} and cannot {task}; use a bundle that was exported with "
            f"--task {task}"
        )
