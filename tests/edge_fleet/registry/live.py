"""Debian's docker-registry on loopback, and bundles of a few bytes to put into it."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from edge.bundle.manifest import FileInfo
from edge_make.file_hash import sha256_file
from edge_make.manifest_bytes import encode_manifest
from tests.makers.manifests import make_manifest

FILES = {
    "decoder.onnx": b"graph",
    "decoder.cpu.onnx": b"twin",
    "decoder.onnx.data": np.random.default_rng(1).bytes(24 << 20),  # several chunks
    "chat_template.jinja": b"{{ messages }}",
    "empty.txt": b"",
}


SMALL = {name: data for name, data in FILES.items() if len(data) < 1000}
"""Where it does not matter that a file is large."""


class LiveRegistry:
    """A registry whose process can be ended and started again; its content and address stay."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("docker-registry") is None:
            pytest.skip("needs Debian's package docker-registry")
        self.address = "127.0.0.1:0"  # the registry finds a port and says which
        self.blobs = folder / "data" / "docker" / "registry" / "v2" / "blobs" / "sha256"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        config, log = self._folder / "registry.yml", self._folder / "registry.log"
        config.write_text(
            "version: 0.1\n"
            "log: {level: info, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {self._folder / 'data'}}}}}\n"
            f"http: {{addr: '{self.address}'}}\n"
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                # Again, too, where a connection of another test has its port for a moment.
                with log.open("wb") as output:
                    self._process = subprocess.Popen(
                        ["docker-registry", "serve", config],
                        stdout=subprocess.DEVNULL,
                        stderr=output,
                    )
            time.sleep(0.02)
            if listening := re.search(r"listening on (127\.0\.0\.1:\d+)\"", log.read_text()):
                self.address = listening[1]
                return
        raise AssertionError(f"the registry does not start: {log.read_text()}")

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def blob(self, digest: str) -> Path:
        """The file in which it keeps a blob."""
        digits = digest.removeprefix("sha256:")
        return self.blobs / digits[:2] / digits / "data"


def write_bundle(target: Path, files: dict[str, bytes] | None = None, name: str = "tiny") -> Path:
    """Write a bundle that no engine would open, but everything that carries it."""
    target.mkdir(parents=True)
    infos: dict[str, FileInfo] = {}
    for file, data in (FILES if files is None else files).items():
        (target / file).write_bytes(data)
        infos[file] = sha256_file(target / file)
    (target / "manifest.json").write_bytes(encode_manifest(make_manifest(name=name, files=infos)))
    return target
