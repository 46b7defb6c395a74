"""Fetches the libraries of the server's page as they were published, and lists them.

usage: python scripts/page_libraries.py fetch | notices | sbom FILE

`packages.json` in the page's `vendor` names every package, its archive in the npm registry with the
registry's hash, and each file that is taken from it with its SHA-256. ``fetch`` writes the files;
after a change of a version it takes the hashes anew and writes them into `packages.json`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

VENDOR = Path(__file__).parent.parent / "edge_serve/http/page/vendor"
PACKAGES = VENDOR / "packages.json"
_TIMEOUT_S = 60


def load() -> list[dict[str, Any]]:
    packages: list[dict[str, Any]] = json.loads(PACKAGES.read_text())
    return packages


def fetch() -> None:
    """Download every archive, hold it against its hash, and write the files taken from it."""
    packages = load()
    for package in packages:
        with urllib.request.urlopen(package["archive"], timeout=_TIMEOUT_S) as response:
            archive = response.read()
        found = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()
        if found != package["integrity"]:
            sys.exit(
                f"{package['archive']} has the hash {found} and not {package['integrity']}; "
                "compare it with `npm view NAME@VERSION dist.integrity` before you take it over"
            )
        with tarfile.open(fileobj=io.BytesIO(archive)) as members:
            for name, file in package["files"].items():
                member = members.extractfile(file["from"])
                if member is None:
                    sys.exit(f"{package['archive']} has no file {file['from']}")
                body = member.read()
                target = VENDOR / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(body)
                file["sha256"] = hashlib.sha256(body).hexdigest()
        print(f"{package['name']} {package['version']}: {len(package['files'])} files")
    PACKAGES.write_text(json.dumps(packages, indent=1) + "\n")


def notices() -> str:
    """Return the packages as a table in Markdown."""
    lines = ["| Name | Version | License | URL |", "|---|---|---|---|"]
    for package in load():
        name = package["name"] + (f" (in {package['within']})" if "within" in package else "")
        url = f"https://www.npmjs.com/package/{package['name']}"
        lines.append(f"| {name} | {package['version']} | {package['license']} | {url} |")
    return "\n".join(lines)


def sbom() -> str:
    """Return the packages as CycloneDX in JSON."""
    components = [
        {
            "type": "library",
            "name": package["name"],
            "version": package["version"],
            "purl": f"pkg:npm/{package['name'].replace('@', '%40')}@{package['version']}",
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
