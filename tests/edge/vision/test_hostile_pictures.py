"""Whatever a stranger sends as a picture gives tiles or an error that says what was found."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge.errors import DependencyError, RequestError, ResourceError
from edge.limited_child import ChildError, LimitedChild, Limits
from edge.vision import decode
from edge.vision.decode import MIN_PILLOW, decode_picture, picture_size
from edge.vision.decode_task import Decoded, Task
from edge.vision.picture import MAX_BYTES, MAX_PIXELS, as_picture

from .pictures import LOSSLESS, LOSSY, TINY_SMOLVLM, chunk, encode, picture, png

PHOTO = picture(120, 90)
GOOD = {
    "PNG": encode(PHOTO),
    "JPEG": encode(PHOTO, "JPEG"),
    "progressive": encode(PHOTO, "JPEG", progressive=True),
    "WEBP": encode(PHOTO, "WEBP"),
    "lossless": encode(PHOTO, "WEBP", lossless=True),
    "GIF": encode(PHOTO, "GIF"),
    "BMP": encode(PHOTO, "BMP"),
}


def refused(data: object) -> str:
    with pytest.raises(RequestError) as raised:
        decode_picture(as_picture(data), TINY_SMOLVLM)
    return str(raised.value)


# ------------------------------------------------------------------------------- size


def huge(name: str) -> bytes:
    """A file whose header says 65,000 x 65,000 pixels, or the most that its format has."""
    size = 65_000
    if name == "PNG":
        return png(size, size, 8, 2, bytes(1000))
    if name == "BMP":
        return GOOD["BMP"][:18] + struct.pack("<ii", size, size) + GOOD["BMP"][26:]
    if name == "GIF":
        place = GOOD["GIF"].index(b"\x2c", 13)  # the first frame
        data = GOOD["GIF"][:6] + struct.pack("<HH", size, size) + GOOD["GIF"][10:]
        return data[: place + 5] + struct.pack("<HH", size, size) + data[place + 9 :]
    start = GOOD["JPEG"].index(b"\xff\xc0") + 5
    return GOOD["JPEG"][:start] + struct.pack(">HH", size, size) + GOOD["JPEG"][start + 4 :]


@pytest.mark.parametrize("name", ["PNG", "BMP", "GIF", "JPEG"])
def test_a_header_of_billions_of_pixels_is_refused_before_they_are_decoded(name: str):
    data = huge(name)
    text = refused(data)
    assert "65,000 x 65,000 pixels; at most 100 million are taken" in text
    with pytest.raises(RequestError, match="65,000 x 65,000 pixels"):
        picture_size(data)


def test_a_webp_bomb_is_refused():
    """Its decoder makes room for all pixels when it is opened."""
    start = GOOD["WEBP"].index(b"\x9d\x01\x2a") + 3
    data = GOOD["WEBP"][:start] + struct.pack("<HH", 16_383, 16_383) + GOOD["WEBP"][start + 4 :]
    assert "a picture (WEBP) is damaged or cut off" in refused(data)


@pytest.mark.slow
def test_ten_thousand_pixels_a_side_are_decoded(monkeypatch: pytest.MonkeyPatch):
    rows = zlib.compress((b"\0" + bytes(i % 256 for i in range(10_000)) * 3) * 10_000)
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    assert len(data) < 2_000_000  # a bomb of 300 MB, and legal
    tiles = decode_picture(data, TINY_SMOLVLM)
    assert (tiles.width, tiles.height, tiles.layout.tiles) == (10_000, 10_000, 17)
    monkeypatch.setattr(decode, "LARGE_LIMITS", Limits(20.0, 256 << 20, tasks=1))
    assert "takes more than 20 s of CPU time or 256 MiB to decode" in refused(data)


def test_an_empty_or_too_long_picture_is_refused(tmp_path: Path):
    assert f"{MAX_BYTES + 1:,} bytes; at most {MAX_BYTES:,}" in refused(bytes(MAX_BYTES + 1))
    assert "no bytes" in refused(b"")
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert "is larger than" in refused(path)


@pytest.mark.parametrize(
    "more",
    [
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 9)),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9)),
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(100_000_000), 9)),
    ],
    ids=["iCCP", "zTXt", "iTXt"],
)
def test_a_chunk_that_unpacks_to_100_mb_is_refused(more: bytes):
    text = refused(png(8, 8, 8, 0, bytes(72), more))
    assert text.startswith("a picture (PNG) is damaged or cut off (Decompressed data too large")


def test_an_animation_of_many_frames_costs_its_first():
    frame = GOOD["GIF"][GOOD["GIF"].index(b"\x21" if b"\x21" in GOOD["GIF"] else b"\x2c", 13) : -1]
    data = GOOD["GIF"][:-1] + frame * 500 + b";"
    np.testing.assert_array_equal(
        decode_picture(data, TINY_SMOLVLM).pixels, decode_picture(GOOD["GIF"], TINY_SMOLVLM).pixels
    )


# ------------------------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"%PDF-1.7\n", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n(id) run", "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + bytes(30), "PostScript"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a text like SVG"),
        (b"\n  <?xml version='1.0'?><svg/>", "a text like SVG"),
        (encode(PHOTO, "TIFF"), "a TIFF"),
        (b"\0\0\0\x1cftypheic" + bytes(20), "a HEIC"),
        (b"RIFF\0\0\0\0WAVE", "in no known format"),
        (encode(PHOTO, "ICO"), "in no known format"),
        (encode(PHOTO, "PPM"), "in no known format"),
        (b"GIF", "in no known format"),
    ],
)
def test_other_formats_are_refused_by_name(data: bytes, found: str):
    """Among them those that run a program (EPS), open other files (SVG), or have most holes."""
    text = refused(data)
    assert text.startswith(f"a picture is {found}")
    assert text.endswith("send a PNG, JPEG, WebP, GIF or BMP")


def test_no_other_decoder_looks_at_a_picture_than_its_first_bytes_say():
    """A file that is several things at once is what it begins with, or nothing."""
    good = decode_picture(GOOD["PNG"], TINY_SMOLVLM).pixels
    both = GOOD["PNG"] + b"%!PS-Adobe-3.0 EPSF-3.0\n" + GOOD["JPEG"]
    np.testing.assert_array_equal(decode_picture(both, TINY_SMOLVLM).pixels, good)
    text = refused(GOOD["PNG"][:8] + encode(PHOTO, "EPS"))
    assert text.startswith("a picture (PNG) is damaged or cut off (its header is not understood)")
    tiff = encode(PHOTO, "TIFF")
    for magic in (b"BM", b"GIF89a", b"\xff\xd8\xff"):
        assert re.search("damaged or cut off|at most 100 mill", refused(magic + tiff))


@pytest.mark.parametrize("value", [None, 3, ["a"], np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8)])
def test_a_value_that_is_no_picture_is_refused(value: object):
    assert "give" in refused(value)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path):
    assert "give the path of a file" in refused(tmp_path / "none.png")
    assert "give the path of a file" in refused(tmp_path)
    (tmp_path / "text.png").write_text("hello")
    assert f"{tmp_path / 'text.png'}: a picture is in no known format" in refused(
        tmp_path / "text.png"
    )


# ------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", GOOD)
def test_a_picture_that_is_cut_off_is_refused(name: str):
    data = GOOD[name]
    for part in (0.02, 0.2, 0.5, 0.9):
        assert "damaged or cut off" in refused(data[: max(16, int(part * len(data)))])


@pytest.mark.slow
@given(
    st.sampled_from(sorted(GOOD)),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 40),
)
@settings(max_examples=150, deadline=None)
def test_a_damaged_header_gives_tiles_or_an_error(
    name: str, changes: list[tuple[int, int]], cut: int
):
    data = bytearray(GOOD[name])
    for place, value in changes:
        data[place % len(data)] = value
    data = data[: len(data) - cut]
    tiles = None
    try:
        tiles = decode_picture(as_picture(data), TINY_SMOLVLM)
    except RequestError as error:
        text = str(error)
    else:
        text = "taken"
    assert text.isprintable()
    if tiles is not None:
        assert tiles.pixels.shape == (tiles.layout.tiles, 32, 32, 3)
        assert picture_size(bytes(data)) == (tiles.width, tiles.height)


def test_a_picture_whose_size_is_not_that_of_its_header_is_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    """Its rows were counted by the header."""
    from edge.vision import decode_child

    monkeypatch.setattr(decode_child, "upright_rgb", lambda image: Image.new("RGB", (3, 4)))
    task = Task(GOOD["PNG"], "PNG", section=TINY_SMOLVLM, max_pixels=MAX_PIXELS)
    answer = decode_child.work(msgspec.msgpack.encode(task))
    found = msgspec.msgpack.decode(answer, type=Decoded)
    assert (found.why, found.pixels) == ("its size is not what its header says", b"")


# ------------------------------------------------------------------------------- the child


def test_pillow_is_loaded_in_the_child_only():
    code = (
        "import sys; from edge.vision.decode import decode_picture;"
        "from tests.edge.vision.test_section import WRITTEN;"
        "sys.stdout.write(f'{decode_picture(sys.stdin.buffer.read(), WRITTEN).layout.tiles} ');"
        "sys.stdout.write(str([name for name in sys.modules if name.startswith('PIL')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=GOOD["JPEG"], capture_output=True, check=True
    )
    assert done.stdout.decode() == "13 []"


def test_no_task_is_done_where_no_process_is_confined(monkeypatch: pytest.MonkeyPatch):
    assert decode.USUAL_LIMITS.confined
    assert decode.LARGE_LIMITS.confined
    for child in (decode._usual, LimitedChild(decode._FUNCTION, decode.LARGE_LIMITS)):
        with pytest.raises(ResourceError, match="not run here"):
            child._take_unconfined("this kernel does not")


def test_every_decoder_works_in_the_confined_child():
    """What a decoder imports when it is first used cannot be imported there."""
    with LimitedChild(decode._FUNCTION, decode.USUAL_LIMITS) as child:
        monkey = pytest.MonkeyPatch()
        with monkey.context() as patch:
            patch.setattr(decode, "_usual", child)
            for name, make in (LOSSLESS | LOSSY).items():
                assert decode_picture(make(), TINY_SMOLVLM).pixels.any(), name
                process = child._process
                assert process is not None
                status = Path(f"/proc/{process.pid}/status").read_text()
                assert "Seccomp:\t2" in status
                assert f"Threads:\t{1}" in status


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(Decoded(4, 4, b"")),
        msgspec.msgpack.encode(Decoded(4, 4, bytes(32 * 32 * 3 - 1))),
        msgspec.msgpack.encode(Decoded(0, 4, bytes(32 * 32 * 3))),
        msgspec.msgpack.encode(Decoded(-4, -4, bytes(32 * 32 * 3))),
        msgspec.msgpack.encode(Decoded(1 << 62, 1 << 62, bytes(32 * 32 * 3))),
        msgspec.msgpack.encode(Decoded(4, 4, why="\x1b[2J")),
    ],
)
def test_a_child_that_was_taken_over_is_not_believed(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decode._usual, "ask", lambda task: answer)
    text = refused(GOOD["PNG"])
    assert text.isprintable()


def test_a_child_that_fails_or_passes_a_limit_is_an_error_of_the_request(
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(task: bytes) -> bytes:
        raise ChildError("it ended with exit code 1 before it answered")

    monkeypatch.setattr(decode._usual, "ask", fail)
    assert "its decoder failed: it ended with exit code 1" in refused(GOOD["PNG"])
    small = LimitedChild(decode._FUNCTION, Limits(0.02, 512 << 20))
    with small:
        monkeypatch.setattr(decode, "_usual", small)
        monkeypatch.setattr(decode, "USUAL_LIMITS", Limits(0.02, 512 << 20))
        text = refused(encode(picture(1500, 1500)))
    assert text.startswith("a picture (PNG) takes more than 0.02 s of CPU time or 512 MiB")


def test_usual_pictures_do_not_wait_for_large_ones():
    with decode._large:
        done = ThreadPoolExecutor(1).submit(decode_picture, GOOD["PNG"], TINY_SMOLVLM)
        assert done.result(timeout=60).layout.tiles == 13


def test_pictures_of_many_threads_do_not_mix():
    pictures = [encode(picture(20 + 7 * i, 30)) for i in range(8)]
    wanted = [decode_picture(each, TINY_SMOLVLM).pixels for each in pictures]
    barrier = threading.Barrier(8)

    def work(index: int) -> bool:
        barrier.wait()
        found = [decode_picture(pictures[index], TINY_SMOLVLM).pixels for _ in range(5)]
        return all(np.array_equal(each, wanted[index]) for each in found)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [True] * 8
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    names = [Path(f"/proc/{child}/cmdline").read_text() for child in children]
    assert sum("vision.decode_child" in name for name in names) == 1


@pytest.mark.parametrize("version", ["none", "9.0.1", "12.2.0"])
def test_a_pillow_that_is_missing_or_has_known_holes_is_not_used(
    version: str, monkeypatch: pytest.MonkeyPatch
):
    real = metadata.version

    def found(name: str) -> str:
        if name == "pillow" and version == "none":
            raise metadata.PackageNotFoundError(name)
        return version if name == "pillow" else real(name)

    decode._require_pillow.cache_clear()
    monkeypatch.setattr(metadata, "version", found)
    with pytest.raises(DependencyError, match=r"pictures need Pillow 1[23].*install"):
        decode_picture(GOOD["PNG"], TINY_SMOLVLM)


def test_the_oldest_pillow_that_is_used_is_that_of_the_extra():
    lines = metadata.requires("jetson-edge-llm") or []
    is_old = sys.version_info < (3, 11)
    found = [
        line for line in lines if line.startswith("pillow") and ("version <" in line) == is_old
    ]
    assert len(found) == 1
    oldest = found[0].partition(";")[0].strip().removeprefix("pillow>=")
    assert [*map(int, f"{oldest}.0".split(".")[:2])] == [*MIN_PILLOW]


def test_limits_leave_room_for_what_is_promised():
    assert MAX_PIXELS == 10_000**2
    assert decode.USUAL_PIXELS < MAX_PIXELS
    assert io.DEFAULT_BUFFER_SIZE < MAX_BYTES
