"""Stands in for the generation that `LLM.submit` returns."""

from __future__ import annotations

from collections.abc import Iterator

from edge.runtime.stream import GenerationChunk


class ScriptedGeneration:
    """Chunks of an iterator, as `Generation` gives them one by one."""

    def __init__(self, chunks: Iterator[GenerationChunk]) -> None:
        self._chunks = chunks

    def take(self, _timeout_s: float) -> GenerationChunk | None:
        return next(self._chunks)

    def cancel(self) -> None:
        self._chunks = iter(())
