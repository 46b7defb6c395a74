"""Every reader of files whose origin nobody vouches for, with a small file that it takes.

The property tests and the fuzz targets go through this table: whatever the bytes, a reader gives a
value or an `EdgeError`, soon and without much memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge.adapters.peft_file import read_adapter
from edge.bundle.embeddings import EmbeddingTable
from edge.bundle.engine_file import ENGINE_JSON, EngineInfo, read_engine_info, rebuild_command
from edge.bundle.linears import linear_layers
from edge.bundle.manifest import MANIFEST_NAME, Tokens, read_manifest
from edge.bundle.minisign import PublicKey, Signature, parse_signature, read_public_keys
from edge.bundle.onnx_file import Message, OnnxFile, tensor_info
from edge.bundle.rope import inverse_frequencies
from edge.bundle.trust import read_signature_bytes
from edge.errors import ConfigError, EdgeError
from edge.files import read_file
from edge.model.cache import Rows
from edge.runtime.prefix_store import PrefixStore, bundle_key
from edge.text.chat_template import ChatTemplate
from edge.text.tokenizer import Tokenizer
from edge.vision.decode import decode_picture, picture_size
from edge.vision.picture import as_picture
from edge_fleet.registry import artifact as artifacts
from edge_fleet.registry.artifact import decode as decode_artifact
from edge_fleet.registry.artifact import encode as encode_artifact
from edge_fleet.registry.client import MANIFEST_TYPE
from edge_fleet.registry.client import MAX_MANIFEST_BYTES as MAX_ARTIFACT_BYTES
from edge_fleet.registry.credentials import find_credentials
from edge_fleet.rollout.journal import Place
from edge_fleet.rollout.orders import ANSWER_NAME, ORDER_NAME, read_answer
from edge_fleet.rollout.switch import StagedFolder, read_order
from edge_lab.cli.conversation import read_conversation
from edge_lab.cli.verify import read_prompts
from edge_lab.measure.drift import read_counts
from edge_lab.measure.evaluate import load_gate
from edge_lab.measure.tasks import read_task
from edge_lab.measure.watch import read_baseline, read_golden
from edge_lab.measure.watch_server import read_state, read_stats_file
from edge_lab.planner.calibration import BENCH_SCHEMA, read_runs
from edge_lab.planner.models import read_config
from edge_make.engine_layers import layers_path, read_layers
from edge_make.key_file import read_key_file
from edge_make.manifest_bytes import encode_manifest
from edge_make.manifest_text import describe_sampling
from edge_make.read_tokenizer import read_tokenizer
from edge_serve.config_file import load_settings
from edge_serve.settings import ServerSettings
from edge_serve.stored.record import head_of
from edge_serve.stored.store import ResponseStore
from engines.rules.check import check_graph
from engines.rules.table import VERSIONS
from export.quantize.recipe import read_recipe
from export.sources.checkpoint_text import read_text
from export.sources.documents import encode_document, read_calibration_text
from export.sources.gguf_file import GgufFile
from export.sources.lora_config import read_lora_config
from export.sources.safetensors_file import SafetensorsFile
from export.sources.vocabulary import read_keep_list
from tests.edge.vision.test_section import WRITTEN as PICTURES
from tests.edge_serve.stored.records import make_record
from tests.makers.keys import encode_public_key, encode_signature
from tests.makers.manifests import make_manifest
from tests.makers.tiny_models import CHAT_TEMPLATE
from tests.standins.slot_rows import layout_of

TOKENS = Tokens(bos=None, bos_text="", eos=(0,), eos_text="", add_bos=False)
_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head")
_VOCABULARY = {chr(code): number for number, code in enumerate(range(0x21, 0x7F))} | {"Ġ": 94}


@dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
        name: name of the file, in a directory of its own.
        seed: a file that is taken.
        read: opens the file at a path and looks at all that is in it.
        mend: makes a damaged file's own hashes right again, so that what is behind them is reached.
    """

    name: str
    seed: bytes
    read: Callable[[Path], object]
    mend: Callable[[bytes], bytes] = bytes

    @property
    def is_json(self) -> bool:
        """Whether the seed is one JSON object."""
        try:
            return isinstance(json.loads(self.seed), dict)
        except ValueError:
            return False

    def try_bytes(self, data: bytes, folder: Path) -> bool:
        """Read bytes; whether they were taken. Anything but an `EdgeError` comes through."""
        path = folder / self.name
        path.write_bytes(data)
        try:
            self.read(path)
        except EdgeError as error:
            if not str(error):
                raise AssertionError("an error says what was wrong") from error
            return False
        return True


# ------------------------------------------------------------------------------- bundles


def resign(data: bytes) -> bytes:
    """The manifest with the right hash of itself, whatever else is in it."""
    field = b'"self_sha256": "'
    head, found, _ = data.rpartition(field)
    if not found:
        head = data.rstrip().removesuffix(b"}").rstrip() + b",\n  "
    blank = head + field + b"0" * 64 + b'"\n}\n'
    return head + field + hashlib.sha256(blank).hexdigest().encode() + b'"\n}\n'


def _manifest(path: Path) -> None:
    manifest = read_manifest(path.parent)
    linear_layers(manifest.model)
    inverse_frequencies(manifest.model.ropes[0], manifest.model.attentions()[0].dim)
    describe_sampling(manifest.sampling)


def _onnx_seed() -> bytes:
    node = Message().add(1, "x").add(2, "y").add(3, "n").add(4, "Identity")
    place = [("location", "data"), ("offset", "0"), ("length", "8")]
    weight = Message().add(1, 2).add(2, 1).add(8, "w").add(14, 1)
    for key, value in place:
        weight.add(13, Message().add(1, key).add(2, value))
    graph = Message().add(1, node).add(5, weight)
    graph.add(11, tensor_info("x", 1, ("batch", 2))).add(12, tensor_info("y", 1, (1, 2)))
    return Message().add(1, 8).add(7, graph).add(8, Message().add(2, 21)).serialize()


def _onnx(path: Path) -> None:
    graph = OnnxFile(path.read_bytes())
    names = [value.name for value in [*graph.inputs, *graph.outputs]]
    _ = graph.opsets, graph.external_tensors()
    graph.set_dimension(names, 0, 7)
    OnnxFile(graph.serialize())


def _safetensors(header: dict[str, Any], data: bytes) -> bytes:
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def _embeddings(path: Path) -> None:
    table = EmbeddingTable(path)
    try:
        _ = table[np.array([0])]
    finally:
        table.close()


_TOKENIZER = {
    "added_tokens": [{"id": 96, "content": "<think>", "special": False}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": "\\p{L}+|\\s+"},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False},
        ],
    },
    "decoder": {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    },
    "model": {"type": "BPE", "vocab": _VOCABULARY | {"ab": 95}, "merges": ["a b"]},
}


def _tokenizer(path: Path) -> None:
    tokenizer = read_tokenizer(path, TOKENS)
    ids = tokenizer.encode("ab <think>")
    tokenizer.encode("ab <think>", control=True)
    tokenizer.decode(ids)
    tokenizer.least_tokens("ab")


def _template(path: Path) -> None:
    template = ChatTemplate(path.read_bytes().decode("utf-8", "replace"), TOKENS)
    template.render([{"role": "user", "content": "hello"}])


def _engine(path: Path) -> None:
    info = read_engine_info(path.parent)
    for profile in info.profiles:
        _ = profile.limits
    rebuild_command(path.parent, info)


def _engine_seed() -> bytes:
    shape = {"min": [1, 1], "opt": [1, 1], "max": [4, 1]}
    inputs = {"position_ids": shape, "logits_indices": shape}
    info = {
        "schema_version": 1, "producer": "edge-llm", "created": "2026-01-01", "key": "k",
        "plan": "decoder.plan", "plan_bytes": 10, "plan_sha256": "0" * 64, "flavour": "tensorrt",
        "tensorrt_version": "10.3.0", "compute_capability": "8.7", "device": None, "jetpack": None,
        "l4t": None, "sources": {"decoder.onnx": "0" * 64}, "max_batch": 4, "max_prefill": 8,
        "kv_capacity": 64, "kv_buckets": [32, 64], "kv_read": "slice",
        "options": {"max_batch": 4}, "profiles": [{"name": "decode", "inputs": inputs}],
        "builder": "api", "build_s": 1.0, "peak_memory_bytes": None, "weights": [], "layers": [],
    }  # fmt: skip
    data = msgspec.json.encode(info)
    msgspec.json.decode(data, type=EngineInfo)
    return data


_MANIFEST = make_manifest()
_LAYOUT = layout_of(2, Rows(1, 4, "fp32"))


def _prefix_file(header: bytes, rows: bytes) -> bytes:
    head = b"edge-llm prefix 2\n" + len(header).to_bytes(8, "little") + header
    return head + hashlib.sha256(header).digest() + rows


def _prefix_seed() -> bytes:
    rows = bytes(4 * 2 * 1 * 3 * 4)
    header = {
        "bundle": bundle_key(_MANIFEST),
        "layout": msgspec.to_builtins(_LAYOUT),
        "ids": [1, 2, 3],
        "rows_sha256": hashlib.sha256(rows).hexdigest(),
    }
    return _prefix_file(json.dumps(header).encode(), rows)


def _response_seed() -> bytes:
    rows = np.zeros(_LAYOUT.num_bytes(3), np.uint8)
    record = make_record(1, rows=3, data=rows)
    assert record.unfinished is not None
    assert record.unfinished.rows is not None
    record.unfinished.rows = msgspec.structs.replace(record.unfinished.rows, layout=_LAYOUT)
    return head_of(record) + rows.tobytes()


def _mend_response(data: bytes) -> bytes:
    length = int.from_bytes(data[20:28], "little")
    if length > len(data) - 60:
        return data
    record, rows = data[28 : 28 + length], data[60 + length :]
    return data[:28] + record + hashlib.sha256(record).digest() + rows


def _responses(path: Path) -> None:
    folder = path.parent / "stored"
    folder.mkdir(mode=0o700, exist_ok=True)
    path.replace(folder / path.name)
    store = ResponseStore(folder, clock=lambda: 0)
    try:
        store.load(make_record(1).id)
        store.load_rows(make_record(1).id, {})
    finally:
        store.close()


def _mend_prefix(data: bytes) -> bytes:
    length = int.from_bytes(data[18:26], "little")
    if length > len(data) - 58:
        return data
    header, rows = data[26 : 26 + length], data[58 + length :]
    return _prefix_file(header, rows)


def _prefixes(path: Path) -> None:
    folder = path.parent / bundle_key(_MANIFEST)[:16]
    folder.mkdir(exist_ok=True)
    path.replace(folder / "a.kv")
    PrefixStore(path.parent, _MANIFEST).list()
    PrefixStore(path.parent, _MANIFEST, _LAYOUT).lookup([1, 2, 3, 4])


# ------------------------------------------------------------------------------- checkpoints


def _tensors(path: Path) -> None:
    file = SafetensorsFile(path)
    for name in list(file.entries)[:100]:
        file.tensor(name)


def _gguf_seed() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = [
        text("general.architecture") + struct.pack("<I", 8) + text("qwen2"),
        text("general.alignment") + struct.pack("<II", 4, 32),
        text("a.list") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<2f", 1.0, 0.1),
        text("a.texts") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
    ]
    tensors = [
        text("a") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0),  # F32 [2, 4]
        text("b") + struct.pack("<IQQIQ", 2, 32, 1, 8, 32),  # Q8_0 [1, 32]
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys + tensors)
    head += bytes(-len(head) % 32)
    return head + bytes(32) + bytes(34)


def _gguf(path: Path) -> None:
    file = GgufFile(path)
    for name in list(file.tensors)[:100]:
        file.tensor(name)


def _checkpoint_text(path: Path) -> None:
    (path.parent / "tokenizer.json").write_text(json.dumps(_TOKENIZER))
    read_text(path.parent, {}, 200)


def _lora(path: Path) -> None:
    config = read_lora_config(path.parent)
    for module in _MODULES:
        _ = config.targets(module), config.saves(module), config.rank(module)
        config.scaling(module)


def _adapter(path: Path) -> None:
    """Read an adapter whose other file is as it should be."""
    for name in ("adapter", "adapter_config"):
        other = path.with_name(READERS[name].name)
        if other != path:
            other.write_bytes(READERS[name].seed)
    read_adapter(path.parent, "a", _MANIFEST, 4)


def _adapter_weights() -> bytes:
    linear = linear_layers(_MANIFEST.model)[0]
    stem = f"base_model.model.{linear.weights[0].removesuffix('.weight')}"
    header, end = {}, 0
    for half, shape in (("A", (2, linear.shape[0])), ("B", (linear.rows[0], 2))):
        begin, end = end, end + 2 * shape[0] * shape[1]
        header[f"{stem}.lora_{half}.weight"] = {
            "dtype": "F16", "shape": shape, "data_offsets": [begin, end]
        }  # fmt: skip
    return _safetensors(header, bytes(end))


_tokenizers: list[Tokenizer] = []


def _one_tokenizer() -> Tokenizer:
    if not _tokenizers:
        _tokenizers.append(Tokenizer(json.dumps(_TOKENIZER).encode(), TOKENS))
    return _tokenizers[0]


def _calibration(path: Path) -> None:
    for document in read_calibration_text(path).documents:
        encode_document(_one_tokenizer(), None, document)


def _lines(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "vocab_size": 320, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "tie_word_embeddings": False,
}  # fmt: skip
_LORA = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "modules_to_save": ["lm_head"],
    "layers_to_transform": [0], "layers_pattern": "layers", "bias": "none",
}  # fmt: skip
_BENCH = {
    "schema": BENCH_SCHEMA, "device": {"name": "cpu", "power_mode": None, "bytes_per_s": None},
    "work": {}, "batch": 1, "context": 8, "prompt_tokens": 8, "max_prefill": 8,
    "tpot_s": {"median": 0.1}, "prefill_s": {"median": 0.1},
}  # fmt: skip
_CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
_FLOATS = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
_ROWS = {"token_embeddings": {"dtype": "F16", "shape": [2, 4], "data_offsets": [0, 16]}}


def _keys(path: Path) -> None:
    path.chmod(0o600)  # or it is refused for that
    read_key_file(path)


_PUBLIC_KEY = encode_public_key(PublicKey(b"12345678", bytes(range(32)), "a")).encode()
_SIGNATURE = encode_signature(Signature(b"12345678", True, bytes(64), "a", bytes(64)))
_LAYER = artifacts.Layer(
    artifacts.MANIFEST_LAYER, f"sha256:{'0' * 64}", 2, {artifacts.TITLE: MANIFEST_NAME}
)
_ARTIFACT = artifacts.Artifact(
    2,
    MANIFEST_TYPE,
    artifacts.ARTIFACT_TYPE,
    artifacts.Layer(artifacts.EMPTY_TYPE, f"sha256:{'0' * 64}", 2),
    (
        _LAYER,
        msgspec.structs.replace(
            _LAYER, media_type=artifacts.FILE_LAYER, annotations={artifacts.TITLE: "a.onnx"}
        ),
    ),
)


def _signature(path: Path) -> Signature:
    data = read_signature_bytes(path.parent)
    assert data is not None
    return parse_signature(data, str(path))


def _artifact(path: Path) -> object:
    try:
        data = read_file(path, MAX_ARTIFACT_BYTES)
    except OSError as error:
        raise ConfigError(str(error)) from error
    return decode_artifact(data, str(path))


def _journal(path: Path) -> object:
    place = Place(path.with_name("r1"))
    place.folder.mkdir(exist_ok=True)
    link = place.folder / path.name
    link.unlink(missing_ok=True)
    link.symlink_to(path)
    return place.read()


def _order(path: Path) -> object:
    with StagedFolder.open(path.parent) as folder:
        return read_order(folder)


def _answer(path: Path) -> object:
    place = Place(path.with_name("r1"))
    place.folder.mkdir(exist_ok=True)
    link = place.folder / ANSWER_NAME
    link.unlink(missing_ok=True)
    link.symlink_to(path)
    return read_answer(place.link)


_PICTURES = {
    "png": "iVBORw0KGgoAAAANSUhEUgAAAAUAAAADCAIAAADUVFKvAAAAGklEQVR4nGM8IRfFgASYGBgYLB4ug/MZ"
    "0eQBe0MERD86oFoAAAAASUVORK5CYII=",
    "jpeg": "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI////////////"
    "////////////////////////////////////////2wBDAVVaWnhpeOuCguv/////////////////////"
    "////////////////////////////////////////////////////wAARCAADAAUDASIAAhEBAxEB/8QA"
    "FQABAQAAAAAAAAAAAAAAAAAAAAP/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFQEBAQAAAAAAAAAAAAAA"
    "AAAAAAP/xAAUEQEAAAAAAAAAAAAAAAAAAAAA/9oADAMBAAIRAxEAPwCYAu//2Q==",
    "webp": "UklGRkAAAABXRUJQVlA4IDQAAABwAQCdASoFAAMAAUAmJbA2wAAcYAD+8Jv88QaxBWo4bX//uHo3VL71"
    "f//2cD//ZwP4kAAA",
    "gif": "R0lGODdhBQADAIEAAAD/AMgeWgAAAAAAACwAAAAABQADAAAICwADCBwIYKDBAAEBADs=",
}
"""Of 5 x 3 pixels; their decoders are in a child, so a fuzzer sees what becomes of its answers."""


def _picture(path: Path) -> None:
    picture = as_picture(path)
    tiles = decode_picture(picture, PICTURES, tiles=4)
    assert picture_size(picture) == (tiles.width, tiles.height)


READERS = {
    "manifest": Reader(MANIFEST_NAME, encode_manifest(_MANIFEST), _manifest, resign),
    "onnx": Reader("decoder.onnx", _onnx_seed(), _onnx),
    "embeddings": Reader("embeddings.safetensors", _safetensors(_ROWS, bytes(16)), _embeddings),
    "tokenizer": Reader("tokenizer.json", json.dumps(_TOKENIZER).encode(), _tokenizer),
    "template": Reader("chat_template.jinja", CHAT_TEMPLATE.encode(), _template),
    "engine": Reader(ENGINE_JSON, _engine_seed(), _engine),
    "layers": Reader(
        "decoder.layers.json",
        b'{"profiles": ["decode"], "layers": []}',
        lambda path: read_layers(_plan_of(path)),
    ),
    "prefix": Reader("a.kv", _prefix_seed(), _prefixes, _mend_prefix),
    "response": Reader(
        f"{make_record(1).id}.response", _response_seed(), _responses, _mend_response
    ),
    "safetensors": Reader("a.safetensors", _safetensors({"a": _FLOATS}, bytes(24)), _tensors),
    "gguf": Reader("a.gguf", _gguf_seed(), _gguf),
    "config": Reader("config.json", json.dumps(CONFIG).encode(), read_config),
    "tokenizer_config": Reader(
        "tokenizer_config.json",
        json.dumps({"eos_token": "<think>", "chat_template": "a", "add_bos_token": False}).encode(),
        _checkpoint_text,
    ),
    "generation": Reader(
        "generation_config.json",
        json.dumps({"eos_token_id": [96], "temperature": 0.6, "top_k": 20}).encode(),
        _checkpoint_text,
    ),
    "lora": Reader("adapter_config.json", json.dumps(_LORA).encode(), _lora),
    "adapter": Reader("adapter_model.safetensors", _adapter_weights(), _adapter),
    "adapter_config": Reader(
        "adapter_config.json", json.dumps(_LORA | {"modules_to_save": None}).encode(), _adapter
    ),
    "calibration": Reader("text.jsonl", _lines({"text": "a b"}, _CHAT), _calibration),
    "prompts": Reader(
        "prompts.txt", b"a b\nc\n", lambda path: read_prompts(path, _one_tokenizer(), 64)
    ),
    "keep_list": Reader("ids.json", b"[1, 2, 3]", read_keep_list),
    "task": Reader(
        "task.jsonl",
        _lines({"question": "a?", "choices": ["a", "b"], "answer": 1}),
        lambda path: [item.expected for _, item in read_task(path)],
    ),
    "numbers": Reader(
        "task.jsonl",
        _lines({"question": "a?", "answer": "b #### 1,234.5"}),
        lambda path: [item.expected for _, item in read_task(path)],
    ),
    "golden": Reader(
        "golden.jsonl", _lines({"id": "a", "prompt": "b", "answer": "c"}), read_golden
    ),
    "recipe": Reader("recipe.json", b'{"quant": "int4", "group_size": 32}', read_recipe),
    "recipe_toml": Reader(
        "recipe.toml", b'quant = "int4"\ngroup_size = 32\n[keep]\n"lm_head" = "fp16"\n', read_recipe
    ),
    "gate": Reader("gate.json", b'{"kl_mean": 0.1}', lambda path: load_gate(str(path), "int8")),
    "gate_toml": Reader("gate.toml", b"kl_mean = 0.1\n", lambda path: load_gate(str(path), "int8")),
    "settings": Reader(
        "edge-llm.toml",
        b'port = 8000\nhost = "127.0.0.1"\nkv_capacity = 64\n',
        lambda path: load_settings(ServerSettings, file=path),
    ),
    "keys": Reader("api-keys", f"a:sk-1234567890123456\nb:sha256:{'0' * 64}\n".encode(), _keys),
    "baseline": Reader(
        "baseline.json",
        b'{"bundle": "a", "golden_sha256": "b", "max_tokens": 1, "items": []}',
        read_baseline,
    ),
    "traffic": Reader("traffic.json", b"{}", read_state),
    "stats": Reader("stats.json", b'{"asked": {}}', read_stats_file),
    "rules": Reader(
        "decoder.onnx",
        _onnx_seed(),
        lambda path: check_graph(path.read_bytes(), path.parent, VERSIONS),
    ),
    **{
        f"picture_{kind}": Reader(f"picture.{kind}", base64.b64decode(seed), _picture)
        for kind, seed in _PICTURES.items()
    },
    "conversation": Reader(
        "talk.json",
        json.dumps([{"role": role, "content": "a"} for role in ("user", "assistant")]).encode(),
        read_conversation,
    ),
    "counts": Reader("counts.json", b"{}", read_counts),
    "bench": Reader("bench.json", json.dumps(_BENCH).encode(), read_runs),
    "trusted_keys": Reader("trusted-keys", b"names: acme/*\n" + _PUBLIC_KEY, read_public_keys),
    "signature": Reader("manifest.json.minisig", _SIGNATURE, _signature),
    "artifact": Reader(
        "origin.json",
        encode_artifact(_ARTIFACT),
        _artifact,
    ),
    "credentials": Reader(
        "config.json",
        b'{"auths": {"a.b": {"auth": "YTpi"}}}',
        lambda path: find_credentials("a.b", {"REGISTRY_AUTH_FILE": str(path), "HOME": "/none"}),
    ),
    "journal": Reader("journal.json", b'{"step": "trial", "new": "r1-a"}', _journal),
    "order": Reader(ORDER_NAME, b'{"id": "%s", "do": "back"}' % (b"0" * 32), _order),
    "answer": Reader(ANSWER_NAME, b'{"id": "", "code": 0}', _answer),
}


def _plan_of(path: Path) -> Path:
    plan = path.with_name("decoder.plan")
    assert layers_path(plan) == path
    return plan


# ------------------------------------------------------------------------------- what is wrong

DEEP = '[{"a":' * 50_000
NASTY: list[Any] = [
    *(-1, 0, 1, 2**31, 2**53, 2**63, 2**64, 10**30, 1e308, 5e-324, 0.5, True, None),
    *("", "\x00", "../x", "/dev/zero", "\x1b[2J", "a" * 3000, "(a+)+$", "é", "9" * 5000),
    *([], {}, [[]], [{}], [None], {"": None}, [0] * 300, {"type": "Sequence"}, {"a": {"b": []}}),
]


def put(tree: Any, place: list[int], value: Any) -> None:
    """Replace what is at a place, or add a key there."""
    node = tree
    while True:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        index, place = place[0] % (len(keys) + 1), place[1:]
        if index == len(keys):
            if isinstance(node, dict):
                node["another"] = value
            else:
                node.append(value)
            return
        if not place or not isinstance(node[keys[index]], dict | list):
            node[keys[index]] = value
            return
        node = node[keys[index]]
