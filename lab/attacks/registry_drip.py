"""Sends a byte at a time as a registry, and times how long `edge-llm bundle pull` follows it.

A roll-out holds its lock meanwhile, so a registry that is followed for ever keeps a device from
every other bundle. A byte per second stays within any limit on a single read.

Usage: python3 -m lab attack-registry-drip [--only head,manifest,blob] [--limit-s 600] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from typing import Any

PAUSE_S = 1.0
_KIND = "vnd.edge-llm.bundle"
ATTACKS = ("head", "manifest", "blob")


def answer(name: str, path: str) -> bytes:
    """Return the bytes to send at once; the rest drips."""
    if name == "head":
        return b"HTTP/1.1 200 OK\r\nX: "
    if name == "blob" and "/manifests/" in path:
        title = {"org.opencontainers.image.title": "manifest.json"}
        layer = {
            "mediaType": f"application/{_KIND}.manifest.v1+json",
            "digest": f"sha256:{hashlib.sha256(b'').hexdigest()}",
            "size": 1 << 20,
            "annotations": title,
        }
        data = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "artifactType": f"application/{_KIND}.v1",
                "config": {**layer, "mediaType": "application/vnd.oci.empty.v1+json", "size": 2},
                "layers": [layer],
            }
        ).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)
    return b"HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n\r\n"


def serve(listener: socket.socket, name: str) -> None:
    def drip(line: socket.socket) -> None:
        with line, suppress(OSError):  # the other end has gone
            while request := line.recv(1 << 16):
                begin = answer(name, request.decode("latin-1").split(" ")[1])
                line.sendall(begin)
                while not begin.endswith(b"}"):
                    time.sleep(PAUSE_S)
                    line.sendall(b"x")

    with suppress(OSError):  # closed
        while True:
            line, _ = listener.accept()
            threading.Thread(target=drip, args=(line,), daemon=True).start()


def attacked(name: str, limit_s: float) -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.TemporaryDirectory() as out:
        threading.Thread(target=serve, args=(listener, name), daemon=True).start()
        reference = f"127.0.0.1:{listener.getsockname()[1]}/r1:stable"
        command = [sys.executable, "-m", "edge.cli", "bundle", "pull", reference, "-o", f"{out}/r1"]
        began = time.monotonic()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            return {"code": None, "seconds": round(limit_s), "said": "it goes on"}
        seconds = round(time.monotonic() - began)
        return {"code": done.returncode, "seconds": seconds, "said": done.stderr.strip()}


def main() -> int:
    parser = argparse.ArgumentParser(
        "python3 -m lab attack-registry-drip", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", default=",".join(ATTACKS), help="what drips, by name")
    parser.add_argument("--limit-s", type=float, default=600.0, help="for each")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(ATTACKS):
        parser.error(f"unknown {sorted(unknown)}; there are {', '.join(ATTACKS)}")
    found = {name: attacked(name, given.limit_s) for name in names}
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        for name, row in found.items():
            print(f"{name:9} code {row['code']} after {row['seconds']} s: {row['said']}")
    return 0 if all(row["code"] == 75 for row in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
