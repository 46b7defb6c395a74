"""`tools artifacts` tells another byte from another minute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.gates import artifacts


def test_times_are_left_out_and_nothing_else_is(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"

    def hashes(**changes: object) -> artifacts.Hashes:
        written = {"created": "now", "files": [{"build_s": 1, "sha": "a"}], **changes}
        manifest.write_text(json.dumps(written))
        return artifacts.hash_files("x", tmp_path)

    before = hashes()
    assert list(before) == ["x/manifest.json"]
    assert hashes(created="later", files=[{"build_s": 2, "sha": "a"}]) == before
    assert hashes(files=[{"build_s": 1, "sha": "b"}]) != before
    found = []
    for data in (b"one", b"two"):
        (tmp_path / "decoder.onnx").write_bytes(data)
        found.append(hashes()["x/decoder.onnx"])
    assert found[0] != found[1]


def test_a_difference_is_named_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hashes.json"

    def run(found: artifacts.Hashes, *arguments: str) -> int:
        monkeypatch.setattr(artifacts, "collect", lambda: found)
        monkeypatch.setattr("sys.argv", ["artifacts", *arguments])
        return artifacts.main()

    assert run({"a": "1", "b": "2"}, "-o", str(file)) == 0
    assert run({"a": "1", "b": "2"}, "--against", str(file)) == 0
    assert run({"a": "1", "c": "3"}, "--against", str(file)) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"2 artifacts, 0 differ from {file}",
        "b: 2 -> gone",
        "c: new -> 3",
        f"2 artifacts, 2 differ from {file}",
    ]
