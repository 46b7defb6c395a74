"""Shows answers and figures on a terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edge.engine_config import EngineConfig
    from edge.runtime.generation import FinishReason, GenerationStats
    from edge.runtime.llm import LLM
    from edge.runtime.stream import GenerationChunk


# C0 except newline and tab; DEL; and C1, whose U+009B alone begins an escape sequence.
_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\N{SYMBOL FOR DELETE}",
    **dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}"),
}


def visible(text: str) -> str:
    """Replace control characters by visible signs, so that an answer cannot command a terminal."""
    return text.translate(_PICTURES)


def is_dumb() -> bool:
    """Whether ``TERM`` names a terminal without escape sequences."""
    return os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def dim(text: str) -> str:
    """Make text paler if the terminal can."""
    return text if is_dumb() else click.style(text, dim=True)


def open_shown(bundle: Path, config: EngineConfig) -> LLM:
    """Open a bundle; on a terminal, show that it is being loaded."""
    from edge.runtime.llm import LLM

    if is_dumb() or not sys.stderr.isatty():
        return LLM(bundle, config)
    from rich.console import Console

    with Console(stderr=True).status(f"checking and loading {visible(bundle.name)}"):
        return LLM(bundle, config)


class StreamPrinter:
    """Prints an answer as it comes: the reasoning dim, then the answer.

    Attributes:
        text: the answer so far, without reasoning.
        stats, finish_reason: those fields of the last chunk.
    """

    def __init__(self) -> None:
        self.text = ""
        self.stats: GenerationStats | None = None
        self.finish_reason: FinishReason | None = None
        self._reasoning = False
        self._is_terminal = sys.stdout.isatty()

    def show(self, chunk: GenerationChunk) -> None:
        """Print one chunk on stdout."""
        shown = visible if self._is_terminal else str
        if chunk.reasoning:
            self._reasoning = True
            click.echo(dim(shown(chunk.reasoning)), nl=False)
        if chunk.text:
            if self._reasoning:
                self._reasoning = False
                click.echo("\n")
            self._write(shown(chunk.text))
            self.text += chunk.text
        if chunk.stats is not None:
            self.stats, self.finish_reason = chunk.stats, chunk.finish_reason

    def _write(self, text: str) -> None:
        click.echo(text, nl=False)

    def end(self, note: str = "") -> None:
        """End the line, after a note on how the answer ended."""
        click.echo(note and f" {note}")

    def warn_if_cut_off(self, llm: LLM) -> None:
        """Say on stderr why an answer ended before the model ended it."""
        if self.finish_reason != "length" or self.stats is None:
            return
        if self.stats.context_left != 0:
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
