"""Answers from your own texts: finds the nearest passages by their vectors and puts them into the
prompt.

edge-llm export Qwen/Qwen3-Embedding-0.6B -o bundles/embedding --quant int8
python docs/examples/retrieval.py manual.txt 'How do I reset the device?'
"""

import os
import sys
from pathlib import Path

import numpy as np

from edge import LLM, SamplingParams

EMBEDDER = os.environ.get("EMBEDDER", "bundles/embedding")
MODEL = os.environ.get("MODEL", "bundles/deepseek-r1-distill-qwen-1.5b-int4")


def passages(text: str, max_chars: int = 800) -> list[str]:
    """Paragraphs, short ones joined up to a length."""
    found = [""]
    for paragraph in filter(None, map(str.strip, text.split("\n\n"))):
        if found[-1] and len(found[-1]) + len(paragraph) > max_chars:
            found.append("")
        found[-1] = f"{found[-1]}\n\n{paragraph}".strip()
    return found


def main(path: str, question: str, nearest: int = 3) -> str:
    texts = passages(Path(path).read_text("utf-8"))
    with LLM(EMBEDDER) as embedder:
        vectors = embedder.embed(texts)  # float32 [texts, dimensions], each of length 1
        [asked] = embedder.embed([question], prompt_name="query")
    best = np.argsort(-(vectors @ asked))[:nearest]
    sources = "\n\n".join(f"[{i + 1}] {texts[i]}" for i in sorted(best))
    prompt = (
        "Answer from these passages only and name their numbers. If they do not say it, say so.\n\n"
        f"{sources}\n\nQuestion: {question}"
    )
    with LLM(MODEL) as llm:
        messages = [{"role": "user", "content": prompt}]
        return llm.generate(messages, SamplingParams(max_tokens=1024)).text


if __name__ == "__main__":
    print(main(sys.argv[1], " ".join(sys.argv[2:])))
