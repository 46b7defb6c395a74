"""How answers and figures look on a terminal."""

from __future__ import annotations

import click

from edge.generation import FinishReason, GenerationStats
from edge.stream import GenerationChunk


class StreamPrinter:
    """Prints an answer as it comes: reasoning dim, then the answer.

    Attributes:
        text: the answer so far, reasoning left out.
        stats, finish_reason: of the last chunk.
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
            click.echo(chunk.text, nl=False)
            self.text += chunk.text
        if chunk.stats is not None:
            self.stats, self.finish_reason = chunk.stats, chunk.finish_reason

    def end(self) -> None:
        """End the line."""
        click.echo()


def format_stats(stats: GenerationStats, reason: FinishReason | None) -> str:
    """One line of figures."""
    cached = f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""
    parts = [
        f"prompt {stats.prompt_tokens} tokens{cached}",
        f"TTFT {stats.ttft_s * 1e3:.0f} ms",
        f"prefill {stats.prefill_tps:.0f} tok/s",
        f"answer {stats.completion_tokens} tokens",
    ]
    if stats.tpot_s:
        parts.append(f"decode {stats.decode_tps:.1f} tok/s")
    if reason == "length":
        parts.append("cut off by --max-tokens or --kv-capacity")
    return "[" + " | ".join(parts) + "]"
