"""How answers and figures look on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edge.runtime.generation import FinishReason, GenerationStats
from edge.runtime.stream import GenerationChunk

if TYPE_CHECKING:
    from edge.runtime.llm import LLM


class StreamPrinter:
    """A printer of an answer as it comes: reasoning dim, then the answer.

    Attributes:
        text: the answer so far, reasoning left out.
        stats, finish_reason: those fields of the last chunk.
    """

    def __init__(self) -> None:
        self.text = ""
        self.stats: GenerationStats | None = None
        self.finish_reason: FinishReason | None = None
        self._reasoning = False

    def show(self, chunk: GenerationChunk) -> None:
        """Print one chunk on stdout."""
        if chunk.reasoning:
            self._reasoning = True
            click.secho(chunk.reasoning, nl=False, dim=True)
        if chunk.text:
            if self._reasoning:
                self._reasoning = False
                click.echo("\n")
            self._write(chunk.text)
            self.text += chunk.text
        if chunk.stats is not None:
            self.stats, self.finish_reason = chunk.stats, chunk.finish_reason

    def _write(self, text: str) -> None:
        click.echo(text, nl=False)

    def end(self, note: str = "") -> None:
        """End the line, after a note about how the answer ended."""
        click.echo(note and f" {note}")

    def warn_if_cut_off(self, llm: LLM) -> None:
        """Say on stderr what ended an answer before the model did."""
        if self.finish_reason != "length" or self.stats is None:
            return
        if self.stats.context_left:
            text = f"after {self.stats.completion_tokens} tokens, as --max-tokens says"
        else:
            text = f"prompt and answer fill the KV cache of {llm.kv_capacity} tokens"
            largest = llm.manifest.rope_positions
            if llm.kv_capacity < largest:
                text += f"; give a larger --kv-capacity (up to {largest}) or --overflow slide"
        click.echo(f"edge-llm: the answer was cut off: {text}", err=True)


def format_stats(stats: GenerationStats) -> str:
    """Write one line of figures."""
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    parts = [
        f"prompt {stats.prompt_tokens} tokens{cached}",
        f"TTFT {stats.ttft_s * 1e3:.0f} ms",
        f"prefill {stats.prefill_tps:.0f} tok/s",
        f"answer {stats.completion_tokens} tokens",
    ]
    if stats.tpot_s:
        parts.append(f"decode {stats.decode_tps:.1f} tok/s")
    return "[" + " | ".join(parts) + "]"
