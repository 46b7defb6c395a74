"""Lists chat templates that were read and found to be bounded by their input.

They run in the process that renders; any other runs in a child with limits (`chat_template`). None
of these builds a list or text of its own size, or passes a message's value to a filter's option.
"""

from __future__ import annotations

import hashlib

R1_WITHOUT_THINK = "b6835114b7303ddd78919a82e4d9f7d8c26ed0d7dfc36beeb12d524f6144eab1"
"""Names the template of `KNOWN_TEMPLATES` that `export` changes, as it opens no reasoning."""
KNOWN_TEMPLATES = {
    R1_WITHOUT_THINK: (
        "DeepSeek-R1-Distill, ends at <｜Assistant｜> (GGUF of the 7B of January 2025)"
    ),
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": (
        "DeepSeek-R1-Distill, the same with <think> and a newline at its end (since February 2025)"
    ),
    "4e9918361c284a93880606d182d64da6a9fe97cdc1f5c5a78c1c8840444246fc": (
        "Qwen2.5-Instruct (GGUF of the Coder of 1.5B)"
    ),
    "55b2f4a26ac9ee719330a61a0c39d9e538b0e9322212f048326318cff4f8674a": (
        "Qwen2.5-Instruct, its braces written once (GGUF of the Coder of 0.5B)"
    ),
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788": (
        "SmolLM2-Instruct (GGUF of the 135M)"
    ),
}
"""Maps the SHA-256 of a template, without white space at its end, to the model it belongs to."""


def is_known_template(source: str) -> bool:
    """Tell whether a template is one of `KNOWN_TEMPLATES`."""
    return template_digest(source) in KNOWN_TEMPLATES


def template_digest(source: str) -> str:
    """Return the SHA-256 of a template without white space at its end."""
    return hashlib.sha256(source.rstrip().encode("utf-8", "surrogatepass")).hexdigest()
