"""Runs what guards the product and ships it: ``python3 -m tools NAME``."""

from __future__ import annotations

import sys

from .environments import DEV, Environment, Program, main

KERNELS = Environment(
    ".venv-kernels",
    ("kernels",),
    has_edge_llm=False,
    variables={
        "TRITON_CACHE_DIR": "$PWD/.venv-kernels/triton",
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
    },
)
"""Triton, which nobody who uses edge-llm needs."""

PROGRAMS = {
    "sizes": Program("tools.gates.sizes", "code lines of each package and of a chat", DEV),
    "voice": Program("tools.gates.voice", "docstrings that read like a translation", DEV),
    "words": Program("tools.gates.words", "length of the manual", DEV),
    "mutants": Program("tools.gates.mutants", "breaks the code; a test must notice", DEV),
    "artifacts": Program("tools.gates.artifacts", "hashes of exports and builds, to compare", DEV),
    "goldens": Program(
        "tools.goldens.references",
        "golden references of the parity tests, by transformers",
        Environment(".venv", ("dev", "smollm2"), ("parity",)),
    ),
    "tasks": Program("tools.goldens.tasks", "word problems of the evaluation", DEV),
    "pictures": Program("tools.pages.pictures", "pictures of the documentation", DEV),
    "support-matrix": Program("tools.pages.support_matrix", "docs/support-matrix.md", DEV),
    "page-libraries": Program(
        "tools.release.page_libraries", "libraries of the server's page", DEV
    ),
    "kernels": Program("tools.kernels.compile", "compiles or checks the GPU kernels", KERNELS),
    "release": Program(
        "tools.release.make",
        "makes and proves a release of the commit",
        Environment(".venv", ("dev", "smollm2"), needs_uv=True),
    ),
}

if __name__ == "__main__":
    sys.exit(main("python3 -m tools", PROGRAMS, sys.argv[1:]))
