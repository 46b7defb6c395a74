"""Fetches the libraries of the server's page as they were published, and lists them.

usage: python3 -m tools page-libraries fetch | notices | sbom FILE

`packages.json` in the page's `vendor` names every package and its archive in a registry with a
hash. It names each file that is taken from it (or from an archive of its own) with its SHA-256.
Fonts with ``unicodes`` are cut down to these by the versions in `_SUBSETTER`; other versions write
other bytes. ``fetch`` writes the files; after a change of a version it takes the new hashes and
writes them into `packages.json`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VENDOR = Path(__file__).parents[2] / "edge_serve/http/page/vendor"
PACKAGES = VENDOR / "packages.json"
_TIMEOUT_S = 60
_SUBSETTER = {"fonttools": "4.68.0", "brotli": "1.2.1"}
# Features that browsers ask a font for in formulas (shapes, accents, dots), and Temml's own.
_FEATURES = "ssty,flac,dtls,kern,mark,mkmk,ccmp,rtlm,ss01,ss04"


def load() -> list[dict[str, Any]]:
    packages: list[dict[str, Any]] = json.loads(PACKAGES.read_text())
    return packages


def fetch() -> None:
    """Download every archive, check it against its hash, and write the files taken from it."""
    packages = load()
    for package in packages:
        for name, file in package["files"].items():
            source = {**package, **file}
            body = _member(_archive(source["archive"], source["integrity"]), file["from"])
            if "unicodes" in file:
                body = _subset(body, file["unicodes"])
            target = VENDOR / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(body)
            file["sha256"] = hashlib.sha256(body).hexdigest()
        print(f"{package['name']} {package['version']}: {len(package['files'])} files")
    PACKAGES.write_text(json.dumps(packages, indent=1) + "\n")


@cache
def _archive(url: str, integrity: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
        archive: bytes = response.read()
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != integrity:
        sys.exit(
            f"{url} has the hash {found} and not {integrity}; "
            "compare it with `npm view NAME@VERSION dist.integrity` before you take it over"
        )
    return archive


def _member(archive: bytes, name: str) -> bytes:
    """Return a file of a tar archive (npm) or of a wheel (PyPI)."""
    if archive.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
            if name in wheel.namelist():
                return wheel.read(name)
    else:
        with tarfile.open(fileobj=io.BytesIO(archive)) as members:
            if name in members.getnames() and (member := members.extractfile(name)):
                return member.read()
    sys.exit(f"there is no file {name} in its archive")


def _subset(font: bytes, unicodes: str) -> bytes:
    """Return a font with these characters only, as WOFF2."""
    wanted = " ".join(f"{name}=={wanted}" for name, wanted in _SUBSETTER.items())
    for name, its in _SUBSETTER.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found != its:
            sys.exit(f"cutting a font down needs {name} {its}, found {found}; pip install {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "font.ttf"), Path(folder, "font.woff2")
        source.write_bytes(font)
        options = [
            f"--unicodes={unicodes}",
            f"--layout-features={_FEATURES}",
            "--flavor=woff2",
            "--no-hinting",
            "--name-IDs=*",
            f"--output-file={target}",
        ]
        command = [sys.executable, "-m", "fontTools.subset", str(source), *options]
        subprocess.run(command, check=True)
        return target.read_bytes()


def notices() -> str:
    """Return the packages as a table in Markdown."""
    lines = ["| Name | Version | License | URL |", "|---|---|---|---|"]
    for package in load():
        name = package["name"] + (f" (in {package['within']})" if "within" in package else "")
        url = package.get("url", f"https://www.npmjs.com/package/{package['name']}")
        lines.append(f"| {name} | {package['version']} | {package['license']} | {url} |")
    return "\n".join(lines)


def sbom() -> str:
    """Return the packages as CycloneDX in JSON."""
    components = [
        {
            "type": "library",
            "name": package["name"],
            "version": package["version"],
            "purl": package.get("purl")
            or f"pkg:npm/{package['name'].replace('@', '%40')}@{package['version']}",
            "licenses": [{"license": {"id": package["license"]}}],
            "externalReferences": [{"type": "distribution", "url": package["archive"]}],
        }
        for package in load()
    ]
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": components,
    }
    return json.dumps(document, indent=1) + "\n"


def main(arguments: list[str]) -> None:
    match arguments:
        case ["fetch"]:
            fetch()
        case ["notices"]:
            print(notices())
        case ["sbom", path]:
            Path(path).write_text(sbom())
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
