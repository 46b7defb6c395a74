"""Debian's docker-registry on loopback, and bundles of a few bytes to put into it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from edge.bundle.manifest import FileInfo, encode_manifest
from edge.bundle.verified_files import sha256_file
from tests.manifests import make_manifest

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
    """A registry whose process can be ended and started again; its content stays."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("docker-registry") is None:
            pytest.skip("needs Debian's package docker-registry")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.blobs = folder / "data" / "docker" / "registry" / "v2" / "blobs" / "sha256"
        self._config = folder / "registry.yml"
        self._config.write_text(
            "version: 0.1\n"
            "log: {level: error, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
            f"http: {{addr: '{self.address}'}}\n"
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["docker-registry", "serve", self._config],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://{self.address}/v2/", timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None, "the registry does not start"
                time.sleep(0.05)
        raise AssertionError("the registry does not answer")

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
