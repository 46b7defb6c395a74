"""Moves a tag of a real registry to a bundle that a device must refuse, and lets it roll out.

Whoever can write to a registry can point a tag at any bundle that the vendor ever signed, or leave
it where it is for ever. Each attack begins with a device on release 2 of BUNDLE. Then its tag leads
to another bundle, and `edge-llm bundle rollout` has to refuse it with exit code 65 and leave the
link. Needs Debian's docker-registry, and twice the space of BUNDLE.

Usage: python3 -m lab attack-replay BUNDLE [--only older,frozen] [--no-releases] [--json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
LIFE_S = 6.0
"""Seconds after which a release of these attacks expires."""


@dataclass(frozen=True)
class Attack:
    """The bundle to which the tag leads after release 2.

    Attributes:
        release: its number; None if it was signed without one; 2 is what the device has.
        name: repository that it was signed for; None is any.
        lives: whether it expires after `LIFE_S`, and is offered then.
    """

    release: int | None
    name: str | None = None
    lives: bool = False


ATTACKS = {
    "older": Attack(1),
    "unnumbered": Attack(None),
    "other": Attack(3, "models/r1-1.5b"),
    "expired": Attack(3, lives=True),
    "frozen": Attack(2, lives=True),
}


def edge_llm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge.cli", "bundle", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def must(*arguments: str | Path) -> None:
    done = edge_llm(*arguments)
    if done.returncode:
        sys.exit(f"edge-llm bundle {arguments[0]} ended with {done.returncode}: {done.stderr}")


@contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Run Debian's registry on loopback; yield its address."""
    config, log = folder / "registry.yml", folder / "registry.log"
    config.write_text(
        "version: 0.1\nlog: {level: info, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
        "http: {addr: '127.0.0.1:0'}\n"
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=output
        )
    try:
        for _ in range(500):
            if found := re.search(r"listening on (127\.0\.0\.1:\d+)", log.read_text()):
                yield found[1]
                return
            time.sleep(0.02)
        sys.exit(f"the registry does not start: {log.read_text()}")
    finally:
        process.kill()
        process.wait()


def copy(address: str, source: str, target: str, tag: str) -> None:
    """Point a tag at another repository's content, which a registry itself can do any time."""

    def ask(method: str, path: str, data: bytes | None = None, **headers: str) -> bytes:
        request = urllib.request.Request(f"http://{address}/v2/{path}", data, headers)
        request.method = method
        with urllib.request.urlopen(request) as answer:
            body: bytes = answer.read()
            return body

    manifest = ask("GET", f"{source}/manifests/{tag}", Accept=MANIFEST_TYPE)
    found = json.loads(manifest)
    for layer in (found["config"], *found["layers"]):
        ask("POST", f"{target}/blobs/uploads/?mount={layer['digest']}&from={source}", b"")
    ask("PUT", f"{target}/manifests/{tag}", manifest, **{"Content-Type": MANIFEST_TYPE})


class Vendor:
    """Signs copies of a bundle and pushes them."""

    def __init__(self, bundle: Path, folder: Path, address: str, releases: bool) -> None:
        self.copy = folder / "copy"
        shutil.copytree(bundle, self.copy, ignore=shutil.ignore_patterns("engines", ".*"))
        self.address, self.releases, self.key = address, releases, folder / "vendor"
        must("keygen", self.key, "--no-password")
        self.keys = self.key.with_suffix(".pub")

    def offer(self, attack: Attack, repository: str, comment: str) -> float:
        """Push the bundle of an attack as REPOSITORY:stable; return when it expires."""
        expires = time.time() + LIFE_S if attack.lives else 0.0
        options: list[str] = []
        if self.releases and attack.release is not None:
            options = ["--release", str(attack.release)]
            options += ["--name", attack.name] if attack.name else []
            if attack.lives:
                at = datetime.datetime.fromtimestamp(expires, datetime.timezone.utc)
                options += ["--expires", f"{at:%Y-%m-%dT%H:%M:%SZ}"]
        (self.copy / "manifest.json.minisig").unlink(missing_ok=True)
        if not options:
            self._forget_release()
        must("sign", self.copy, "--key", f"{self.key}.key", "--comment", comment, *options)
        home = attack.name or repository
        must("push", self.copy, f"{self.address}/{home}:stable")
        if home != repository:
            copy(self.address, home, repository, "stable")
        return expires

    def _forget_release(self) -> None:
        """Restore the bundle before releases: the same files, and a manifest without a release."""
        from edge.bundle.manifest import read_manifest
        from edge_make.atomic_swap import update_manifest

        manifest = read_manifest(self.copy)
        if manifest.extras.pop("release", None) is not None:
            update_manifest(self.copy, manifest)


def attacked(vendor: Vendor, folder: Path, name: str) -> dict[str, Any]:
    attack, repository = ATTACKS[name], f"models/{name}"
    place = folder / name
    place.mkdir()
    link = place / "r1"
    rollout = ["rollout", f"{vendor.address}/{repository}:stable", "--link", str(link)]
    rollout += ["--gate", "none", "--no-build", "--trusted-keys", str(vendor.keys)]
    is_frozen = attack == ATTACKS["frozen"]
    expires = vendor.offer(attack if is_frozen else Attack(2), repository, "new")
    must(*rollout)
    before = link.readlink()
    if not is_frozen:
        expires = vendor.offer(attack, repository, "old")
    time.sleep(max(expires - time.time() + 1.0, 0.0))
    done = edge_llm(*rollout)
    return {
        "code": done.returncode,
        "link": f"{before} -> {link.readlink()}",
        "refused": done.returncode == 65 and link.readlink() == before,
        "said": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        "python3 -m lab attack-replay", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", default=",".join(ATTACKS), help="attacks, by name")
    parser.add_argument(
        "--no-releases", action="store_true", help="sign without numbers, as before there were any"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(ATTACKS):
        parser.error(f"unknown attacks {sorted(unknown)}; there are {', '.join(ATTACKS)}")
    if shutil.which("docker-registry") is None:
        parser.error("this needs a registry: apt-get install docker-registry")
    with tempfile.TemporaryDirectory() as text, registry(Path(text)) as address:
        vendor = Vendor(given.bundle, Path(text), address, not given.no_releases)
        found = {name: attacked(vendor, Path(text), name) for name in names}
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        for name, row in found.items():
            verdict = "refused" if row["refused"] else "TAKEN"
            print(f"{name:11} {verdict:8} code {row['code']}, {row['link']}; {row['said']}")
    return 0 if all(row["refused"] for row in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
