"""Pictures on the command line: run and chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edge import LLM, SamplingParams
from edge.bundle.embeddings import PICTURE_IDS
from edge_lab.cli.conversation import read_conversation
from tests.command_line import Result
from tests.conftest import Bundles

from .test_prompt import ask, draw

ONE = ("--backend", "ort-cpu", "--num-threads", "1", "--temperature", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for seed, name in ((1, "one.png"), (2, "two.bmp")):
        found.append(folder / name)
        image.fromarray(draw(seed)).save(found[-1])
    return found


@pytest.fixture(scope="module")
def texts(vision_bundle: Path, files: list[Path]) -> dict[str, str]:
    """What a model says of each picture alone, of both, and of none."""
    params = SamplingParams(temperature=0, max_tokens=8)
    with LLM(vision_bundle, backend="ort-cpu", num_threads=1) as llm:
        return {
            name: llm.generate(ask(*pictures, "What?"), params).text
            for name, pictures in (
                ("one", files[:1]),
                ("two", files[1:]),
                ("both", files),
                ("none", []),
            )
        }


def test_run_shows_pictures(
    edge_llm: Callable[..., Result], vision_bundle: Path, files: list[Path], texts: dict[str, str]
) -> None:
    for name, given in (("one", files[:1]), ("both", files), ("none", [])):
        options = [word for path in given for word in ("--image", path)]
        done = edge_llm("run", vision_bundle, "What?", *options, *ONE, "--json")
        assert json.loads(done.out)["text"] == texts[name]
    few = edge_llm(
        "run", vision_bundle, "What?", "--image", files[0], "--image-tiles", "0", *ONE, "--json"
    )
    all_ = edge_llm(
        "run", vision_bundle, "What?", "--image", files[0], "--image-tiles", "16", *ONE, "--json"
    )
    less, more = (json.loads(done.out)["stats"]["prompt_tokens"] for done in (few, all_))
    assert less < more


def test_run_names_what_is_wrong(
    edge_llm: Callable[..., Result],
    vision_bundle: Path,
    tiny_bundles: Bundles,
    files: list[Path],
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for bundle, options, said in (
        (vision_bundle, ["--image", tmp_path / "none.png"], "none.png"),
        (vision_bundle, ["--image", text], "no known format"),
        (vision_bundle, ["--image", files[0], "--raw"], "--system and --image need"),
        (tiny_bundles("qwen2"), ["--image", files[0]], "reads text only"),
        (tiny_bundles("qwen2"), ["--image-tiles", "1"], "leave image_tiles out"),
    ):
        done = edge_llm("run", bundle, "What?", *options, *ONE)
        assert done.code != 0
        assert said in done.err, done.err
        assert len(done.err.splitlines()) == 1


def test_chat_shows_pictures_and_keeps_them(
    edge_llm: Callable[..., Result],
    vision_bundle: Path,
    files: list[Path],
    texts: dict[str, str],
    tmp_path: Path,
) -> None:
    saved = tmp_path / "chat.json"

    def chat(*lines: str) -> Result:
        stdin = "".join(f"{line}\n" for line in lines)
        return edge_llm("chat", vision_bundle, *ONE, stdin=stdin)

    done = chat(f"/image {files[0]}", "What?", f"/save {saved}")
    assert "one.png goes with the next message." in done.out
    assert texts["one"].strip() in done.out
    question, answer = read_conversation(saved)
    assert [part["type"] for part in question["content"]] == ["image", "text"]
    assert question["content"][0]["image"].data == files[0].read_bytes()
    url = json.loads(saved.read_text())[0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    again = chat(f"/load {saved}", "/regen", f"/save {saved}")
    assert again.err == done.err
    assert read_conversation(saved) == [question, answer]
    edited = chat(f"/load {saved}", "/edit What?", f"/save {saved}")
    assert read_conversation(saved) == [question, answer], edited.err


def test_chat_names_what_is_wrong(
    edge_llm: Callable[..., Result],
    vision_bundle: Path,
    tiny_bundles: Bundles,
    files: list[Path],
    tmp_path: Path,
) -> None:
    stdin = f"/image {tmp_path / 'none.png'}\n"
    assert "none.png" in edge_llm("chat", vision_bundle, *ONE, stdin=stdin).err
    stdin = f"/image {files[0]}\n"
    done = edge_llm("chat", tiny_bundles("qwen2"), *ONE, stdin=stdin)
    assert "reads text only" in done.err
    for content in (
        [],
        [{"type": "text", "text": "x"}],
        [{"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}],
        [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "text", "text": "x"},
        ],
    ):
        path = tmp_path / "bad.json"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "y"}]
        path.write_text(json.dumps(messages))
        done = edge_llm("chat", vision_bundle, *ONE, stdin=f"/load {path}\n")
        assert "error:" in done.err, content


def test_bench_times_a_picture(
    edge_llm: Callable[..., Result],
    vision_bundle: Path,
    tiny_bundles: Bundles,
    files: list[Path],
) -> None:
    short = [*ONE[:4], "--repeats", "2", "--prompt-tokens", "8", "--output-tokens", "2"]
    options = ("--image", files[0], "--image-tiles", "16")
    done = edge_llm("bench", vision_bundle, *short, *options, "--json")
    found = json.loads(done.out)["picture"]
    assert (found["tiles"], found["rows"]) == (13, 52)
    assert found["prompt_tokens"] > 52
    assert min(found["decode_s"], found["vision_s"], found["prefill_s"]) > 0
    parts = found["decode_s"] + found["vision_s"] + found["prefill_s"]
    assert parts <= found["ttft_s"] * 1.5
    shown = edge_llm("bench", vision_bundle, *short, *options)
    assert "13 tiles, 52 rows of" in " ".join(shown.out.split())
    for bundle, given, said in (
        (vision_bundle, ("--image-tiles", "1"), "needs a picture to cut"),
        (tiny_bundles("qwen2"), ("--image", files[0]), "reads text only"),
    ):
        done = edge_llm("bench", bundle, *short, *given)
        assert done.code != 0
        assert said in done.err


def test_plan_says_what_a_picture_takes(
    edge_llm: Callable[..., Result], vision_bundle: Path, tiny_bundles: Bundles
) -> None:
    on_gpu = json.loads(edge_llm("plan", vision_bundle, "--json").out)["pictures"]
    assert (on_gpu["rows_per_tile"], on_gpu["default_rows"], on_gpu["most_rows"]) == (4, 68, 68)
    assert on_gpu["encoder_bytes"] > 100_000
    on_cpu = json.loads(edge_llm("plan", vision_bundle, "--device", "cpu", "--json").out)
    assert (on_cpu["pictures"]["default_rows"], on_cpu["pictures"]["most_rows"]) == (4, 68)
    with LLM(vision_bundle, backend="ort-cpu", num_threads=1) as llm:
        ids = llm.encode(ask(draw(1, 128, 128), "x"))
        assert sum(id_ >= PICTURE_IDS for id_ in ids) == on_cpu["pictures"]["default_rows"]
    for device in ("agx-orin-64", "cpu"):
        shown = edge_llm("plan", vision_bundle, "--device", device).out
        assert "68 with all tiles" in shown
        assert ("ms of prefill" in shown) == (device != "cpu")
    assert "pictures" not in json.loads(edge_llm("plan", tiny_bundles("qwen2"), "--json").out)
