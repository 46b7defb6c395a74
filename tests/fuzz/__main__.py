"""Fuzz one reader of `tests.readers`: ``python -m tests.fuzz NAME [CORPUS...] [-OPTION=VALUE]``.

Runs under atheris, which is in an environment of its own (`tools/fuzz`). The mutator changes
bytes or, of JSON, values, and makes the file's own hashes right again. A finding is an exception
that is no `EdgeError`, a run over libFuzzer's ``-timeout``, or memory over its ``-rss_limit_mb``.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edge", "engines", "export"]):
    from tests.readers import NASTY, READERS, put


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"usage: python -m tests.fuzz NAME [OPTION...]; NAME is {', '.join(READERS)}")
    reader = READERS[sys.argv.pop(1)]
    shared = Path("/dev/shm")
    folder = tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None)

    def run(data: bytes) -> None:
        reader.try_bytes(data, Path(folder.name))

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if not data:
            data = reader.seed
        changed = b""
        if reader.is_json and chance.random() < 0.5:
            changed = _change_value(data, chance)
        if not changed:
            changed = bytes(atheris.Mutate(data, max_size))
        return reader.mend(changed)[:max_size]

    with folder:
        atheris.Setup(sys.argv, run, custom_mutator=mutate)
        atheris.Fuzz()


def _change_value(data: bytes, chance: random.Random) -> bytes:
    """Put a nasty value somewhere in a JSON object; nothing if it is none."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return b""
    if not isinstance(tree, dict | list):
        return b""
    place = [chance.randrange(64) for _ in range(chance.randint(1, 6))]
    put(tree, place, json.loads(json.dumps(chance.choice(NASTY))))
    return json.dumps(tree, indent=2).encode()


if __name__ == "__main__":
    main()
