"""Tiny checkpoints that the tools of others quantized, with what those tools make of them.

``tools/goldens/quantized.py`` writes the files. A file holds the tensors in which the tool's
checkpoint differs from the one that it was given (`write_base`), and the reference.
"""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tiny_models import FIRST_CONTROL_ID, write_checkpoint

DIRECTORY = Path(__file__).parents[1] / "data" / "quantized"
NAMES = tuple(sorted(path.stem for path in DIRECTORY.glob("*.npz")))
# As many KV heads as heads: GPTQModel's AWQ takes no narrower linear.
_BASE: dict[str, Any] = {
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_key_value_heads": 4,
}
IDS: NDArray[np.int64] = np.random.RandomState(7).randint(0, FIRST_CONTROL_ID, size=24).astype("i8")
"""What the reference logits are of."""
NUM_LOGITS = 160

Raw = tuple[str, tuple[int, ...], bytes]
"""Type as safetensors names it, shape, bytes."""


@dataclass(frozen=True)
class QuantizedGolden:
    """What a tool wrote, and its own reference.

    Attributes:
        tools: version by package.
        config: ``quantization_config`` of its config.json.
        tensors: tensors that are not in the base checkpoint, or differ.
        removed: tensors of the base that are no longer there.
        weights_type: numpy's name of the type in which the tool computes weights.
        weights_sha256: of each dequantized weight ``[out, in]`` in that type, by HF name.
        logits: of the last of `IDS`, the first `NUM_LOGITS`: of the float model with these weights,
            and inputs rounded to INT8 where the tool's model does that by a stored scale.
    """

    tools: dict[str, str]
    config: dict[str, Any]
    tensors: dict[str, Raw]
    removed: list[str]
    weights_type: str
    weights_sha256: dict[str, str]
    logits: NDArray[np.float32]

    def save(self, name: str) -> None:
        facts = {
            "tools": self.tools,
            "config": self.config,
            "tensors": {key: [kind, shape] for key, (kind, shape, _) in self.tensors.items()},
            "removed": self.removed,
            "weights_type": self.weights_type,
            "weights_sha256": self.weights_sha256,
        }
        data = b"".join(raw for _, _, raw in self.tensors.values())
        lengths = [len(raw) for _, _, raw in self.tensors.values()]
        DIRECTORY.mkdir(exist_ok=True)
        np.savez_compressed(
            DIRECTORY / f"{name}.npz",
            facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
            data=np.frombuffer(data, np.uint8),
            lengths=np.array(lengths, np.int32),
            logits=self.logits,
        )

    @classmethod
    def load(cls, name: str) -> QuantizedGolden:
        with np.load(DIRECTORY / f"{name}.npz", allow_pickle=False) as file:
            facts = json.loads(file["facts"].tobytes())
            data, ends = file["data"].tobytes(), np.cumsum(file["lengths"]).tolist()
            logits = file["logits"]
        starts = [0, *ends[:-1]]
        tensors = {
            key: (kind, tuple(shape), data[start:end])
            for (key, (kind, shape)), start, end in zip(
                facts.pop("tensors").items(), starts, ends, strict=True
            )
        }
        return cls(**facts, tensors=tensors, logits=logits)

    def write(self, directory: Path) -> Path:
        """Write the tool's checkpoint as it was."""
        write_base(directory)
        path = directory / "model.safetensors"
        tensors = read_raw(path)
        write_raw(
            path,
            {key: raw for key, raw in tensors.items() if key not in self.removed} | self.tensors,
        )
        change_config(directory, quantization_config=self.config)
        return directory


def write_base(directory: Path) -> Path:
    """Write the checkpoint that every tool was given, in bf16."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in _base_files().items():
        (directory / name).write_bytes(content)
    return directory


@functools.cache
def _base_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), "qwen2", **_BASE)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def change_config(directory: Path, **changes: Any) -> None:
    """Set keys of a config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def read_raw(path: Path) -> dict[str, Raw]:
    """The tensors of a safetensors file as bytes."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            tuple(entry["shape"]),
            content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def write_raw(path: Path, tensors: dict[str, Raw]) -> None:
    """Write a safetensors file of bytes."""
    header, data = {}, b""
    for name, (kind, shape, raw) in tensors.items():
        offsets = (len(data), len(data) + len(raw))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        data += raw
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
