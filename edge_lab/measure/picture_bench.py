"""Times a picture up to the first token: decoding, the encoder, and the prompt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from edge.errors import RequestError
from edge.runtime.llm import LLM
from edge.runtime.sampling_params import SamplingParams
from edge.vision.picture import as_picture
from edge.vision.rows import PictureTable

QUESTION = "Describe this picture."
_ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def bench_picture(llm: LLM, image: Path, *, repeats: int, warmup: int) -> dict[str, Any]:
    """Ask about a picture several times, each time as if it were new.

    Args:
        llm: an open bundle that reads pictures and reuses no prefix.
        image: the picture's file.
        repeats: measured runs.
        warmup: runs before them.

    Returns:
        ``tiles`` and ``rows`` of the picture, ``prompt_tokens``, and medians in seconds:
        ``decode_s`` for reading the file, ``vision_s`` for all tiles, ``prefill_s`` for the prompt
        with its rows, and ``ttft_s`` for all of it.

    Raises:
        RequestError: the bundle reads text only, or the file is no picture.
        ContextLengthError: the picture does not fit into the cache.
    """
    if not llm.reads_images:
        raise RequestError(f"--image: {llm.manifest.name} reads text only")
    picture = as_picture(image)
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}]
    table = cast(PictureTable, llm.embeddings)
    runs = [_ask(llm, table, messages) for _ in range(warmup + repeats)][warmup:]
    seconds = {
        key: float(np.median([run[key] for run in runs])) for key in runs[0] if key.endswith("_s")
    }
    return {"image": str(image), **runs[0], **seconds}


def _ask(llm: LLM, table: PictureTable, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Ask once, and return the times."""
    table.forget()
    started, tiles, vision_s = time.perf_counter(), table.encoded_tiles, table.encoding_s
    ids: Any = llm.encode(messages, max_tokens=llm.kv_capacity)
    decode_s = time.perf_counter() - started
    stats = llm.submit(messages, _ONE_TOKEN, ids=ids).result().stats
    vision_s = table.encoding_s - vision_s
    return {
        "tiles": table.encoded_tiles - tiles,
        "rows": sum(picture.num_rows for picture in ids.pictures),
        "prompt_tokens": len(ids),
        "decode_s": decode_s,
        "vision_s": vision_s,
        "prefill_s": stats.ttft_s - stats.queue_s - vision_s,
        "ttft_s": decode_s + stats.ttft_s,
    }
