"""Makes the pictures of the README for `python3 -m tools pictures`.

Only the boxes of the flow are typed by hand: the chart is `edge-llm plan`'s, the terminal is a
recording of `scripts/quickstart`, the page is a screenshot of a served bundle.
"""

from __future__ import annotations

import codecs
import contextlib
import html
import itertools
import os
import pty
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import urllib.request
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any, NamedTuple

from edge.errors import EdgeError

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
BUNDLE = ROOT / "bundles" / "smollm2-135m-int8"
QUESTION = "Write a Python function that returns the sum of two numbers, and explain it briefly."
MOST_BYTES = 1_500_000

COLUMNS, LINES = 88, 30
GAP_S = 0.6  # the longest pause to keep: the machine that recorded had other work
MOST_S = 20.0  # nobody watches longer, so a longer recording is played faster
START_S = 300

LIGHT = {
    "page": "#ffffff",
    "ink": "#17202a",
    "soft": "#55606c",
    "box": "#f1f4f6",
    "accent": "#0a6b5d",
}
DARK = {
    "page": "#12161a",
    "ink": "#e4e8ec",
    "soft": "#9da8b3",
    "box": "#1e252c",
    "accent": "#4fc3ae",
}


def style(rules: str) -> str:
    """Make a style element for both colour schemes; the rules name the colours as variables."""

    def colours(scheme: dict[str, str]) -> str:
        return ":root{" + "".join(f"--{name}:{value};" for name, value in scheme.items()) + "}"

    dark = f"@media (prefers-color-scheme:dark){{{colours(DARK)}}}"
    return f"<style>{colours(LIGHT)}{dark}{rules}</style>"


# --------------------------------------------------------------------------- the flow

# Column, row, title, and the text below it.
BOXES = [
    (0, 0, "Checkpoint", ["Hugging Face directory,", "hub id or GGUF file"]),
    (1, 0, "edge-llm export", ["reads, quantizes,", "builds the graph"]),
    (2, 0, "Bundle", ["plain ONNX for CPU and GPU,", "weights, tokenizer, manifest"]),
    (3, 0, "CPU", ["ONNX Runtime", "on any Linux machine"]),
    (2, 1, "edge-llm build", ["TensorRT engine", "on the device itself"]),
    (3, 1, "GPU", ["TensorRT,", "ONNX Runtime CUDA"]),
    (4, 0, "Answers", ["run, chat, serve,", "from edge import LLM"]),
]
ARROWS = [
    ((0, 0), (1, 0)),
    ((1, 0), (2, 0)),
    ((2, 0), (3, 0)),
    ((2, 0), (2, 1)),
    ((2, 1), (3, 1)),
    ((3, 0), (4, 0)),
    ((3, 1), (4, 0)),
]
WIDTH, HEIGHT, GAP_X, GAP_Y = 200, 84, 32, 46


def flow() -> str:
    """Draw the way from a checkpoint to answers."""
    parts = []
    for one, other in ARROWS:
        x1, y1 = one[0] * (WIDTH + GAP_X) + WIDTH, one[1] * (HEIGHT + GAP_Y) + HEIGHT // 2
        x2, y2 = other[0] * (WIDTH + GAP_X), other[1] * (HEIGHT + GAP_Y) + HEIGHT // 2
        if one[0] == other[0]:
            x1 = x2 = one[0] * (WIDTH + GAP_X) + WIDTH // 2
            y1, y2 = y1 + HEIGHT // 2, y2 - HEIGHT // 2
            path = f"M{x1},{y1}V{y2 - 4}"
        elif one[1] == other[1]:
            path = f"M{x1},{y1}H{x2 - 4}"
        else:  # from below, into the middle of the box
            middle = x2 + WIDTH / 2
            path = f"M{x1},{y1}H{middle}V{y2 + HEIGHT // 2 + 4}"
        parts.append(f'<path d="{path}" marker-end="url(#tip)"/>')
    for column, row, title, lines in BOXES:
        x, y = column * (WIDTH + GAP_X), row * (HEIGHT + GAP_Y)
        parts.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="10"/>')
        middle = x + WIDTH / 2
        parts.append(f'<text class="title" x="{middle}" y="{y + 28}">{html.escape(title)}</text>')
        parts += [
            f'<text x="{middle}" y="{y + 50 + 18 * at}">{html.escape(line)}</text>'
            for at, line in enumerate(lines)
        ]
    width = 5 * WIDTH + 4 * GAP_X
    height = 2 * HEIGHT + GAP_Y
    rules = (
        "rect{fill:var(--box);stroke:var(--soft);stroke-opacity:.5}"
        "text{fill:var(--soft);font:13px system-ui,sans-serif;text-anchor:middle}"
        ".title{fill:var(--ink);font-weight:600;font-size:15px}"
        "path{fill:none;stroke:var(--accent);stroke-width:2}"
        "#tip path{fill:var(--accent);stroke:none}"
    )
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="5" markerHeight="5" '
        'orient="auto"><path d="M0,0L8,4L0,8z"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 {width + 4} {height + 4}" '
        f'width="{width}" role="img"><title>From a checkpoint to answers</title>{style(rules)}'
        f"<defs>{tip}</defs>{''.join(parts)}</svg>\n"
    )


# --------------------------------------------------------------------------- the terminal


class Moment(NamedTuple):
    """Bytes that a program wrote, and when, in seconds from its start."""

    at_s: float
    data: bytes


def record(command: list[str]) -> list[Moment]:
    """Run a command in a terminal of its own; return its output.

    Raises:
        EdgeError: it failed.
    """
    terminal, side = pty.openpty()
    ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    child = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env=env, start_new_session=True
    )
    os.close(side)
    moments, began = [], time.monotonic()
    while True:
        select.select([terminal], [], [])
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux's way to say that the last writer has gone
            data = b""
        if not data:
            break
        moments.append(Moment(time.monotonic() - began, data))
    os.close(terminal)
    status = child.wait()
    if status:
        text = b"".join(moment.data for moment in moments).decode("utf-8", "replace")
        raise EdgeError(f"{' '.join(command)} ended with {status}: {text[-500:]}")
    return moments


_TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(\r|\n|\x08)|([^\x1b\r\n\x08]+)")


class Screen:
    """As much of a terminal as the recorded programs use; it refuses anything else."""

    def __init__(self) -> None:
        self.rows: list[list[tuple[str, str]]] = [[]]  # of (character, class)
        self.x = self.y = 0
        self.pen = ""

    def feed(self, text: str) -> None:
        """Take what a program wrote.

        Raises:
            EdgeError: a control sequence that is not known here.
        """
        at = 0
        while at < len(text):
            token = _TOKEN.match(text, at)
            if token is None:
                raise EdgeError(
                    f"the recording has {text[at : at + 12]!r}; teach it to Screen.feed"
                )
            at = token.end()
            arguments, code, control, plain = token.groups()
            if plain is not None:
                for character in plain:
                    self._put(character)
            elif control is not None:
                self._control(control)
            else:
                self._command(arguments, code)

    def _control(self, control: str) -> None:
        if control == "\n":
            self.y += 1
            while len(self.rows) <= self.y:
                self.rows.append([])
        elif control == "\r":
            self.x = 0
        else:
            self.x = max(0, self.x - 1)

    def _put(self, character: str) -> None:
        if self.x >= COLUMNS:
            self._control("\n")
            self.x = 0
        row = self.rows[self.y]
        row.extend([(" ", "")] * (self.x + 1 - len(row)))
        row[self.x] = (character, self.pen)
        self.x += 1

    def _command(self, arguments: str, code: str) -> None:
        number = int(arguments) if arguments.isdigit() else 0
        if code == "A":
            self.y = max(0, self.y - (number or 1))
        elif code == "K" and number == 2:
            self.rows[self.y] = []
        elif code == "K" and number == 0:
            del self.rows[self.y][self.x :]
        elif code == "m":
            self._colour([int(one or 0) for one in arguments.split(";")])
        elif not (code in "hl" and arguments.startswith("?")):  # cursor, pasting: not to be seen
            raise EdgeError(f"the recording has CSI {arguments}{code}; teach it to Screen.feed")

    def _colour(self, numbers: list[int]) -> None:
        left = iter(numbers)
        for number in left:
            if number == 38:  # of a palette or of three colours; what is grey is in the background
                kind = next(left)
                parts = [next(left) for _ in range(1 if kind == 5 else 3)]
                is_grey = parts[0] >= 232 if kind == 5 else max(parts) - min(parts) < 30
                self.pen = "soft" if is_grey else "accent"
            elif number in (0, 22, 39):
                self.pen = ""
            elif number in (2, 90):
                self.pen = "soft"
            elif number == 1:
                self.pen = "bold"
            elif 30 <= number <= 37 or 91 <= number <= 97:
                self.pen = "accent"

    def lines(self) -> list[str]:
        """Return the rows as text with elements for their colours."""
        return [_marked(row) for row in self.rows]


def _marked(row: list[tuple[str, str]]) -> str:
    parts: list[tuple[str, str]] = []
    for character, pen in row:
        if parts and parts[-1][1] == pen:
            parts[-1] = (parts[-1][0] + character, pen)
        else:
            parts.append((character, pen))
    return "".join(
        f'<tspan class="{pen}">{html.escape(text)}</tspan>' if pen else html.escape(text)
        for text, pen in parts
    ).rstrip()


def animated(prompt: str, moments: list[Moment]) -> str:
    """Draw a recording: each state of a line is a text that is seen for as long as it was there.

    A reader who wants no motion sees the end at once.
    """
    screen, clock, before = Screen(), 1.0, 0.0
    ends = [0.0, *(moment.at_s for moment in moments)]
    total = sum(min(after - at, GAP_S) for at, after in itertools.pairwise(ends))
    pace = min(1.0, MOST_S / total)
    begun: dict[int, tuple[float, str]] = {}
    states: list[tuple[int, str, float, float | None]] = []  # row, text, from, until
    held = ""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for moment in moments:
        clock += pace * min(moment.at_s - before, GAP_S)
        before = moment.at_s
        text = held + decoder.decode(moment.data)
        # A control sequence may be cut, as a character may be.
        cut = re.search(r"\x1b(\[[?\d;]*)?$", text)
        held, text = (text[cut.start() :], text[: cut.start()]) if cut else ("", text)
        screen.feed(text)
        lines = screen.lines()
        for y, line in enumerate(lines):
            since, old = begun.get(y, (clock, ""))
            if line != old:
                if old and clock > since:
                    states.append((y, old, since, clock))
                begun[y] = (clock, line)
    states += [(y, line, since, None) for y, (since, line) in begun.items() if line]
    return _terminal(prompt, states)


def _terminal(prompt: str, states: list[tuple[int, str, float, float | None]]) -> str:
    line, size = 19, 14
    rows = max(y for y, *_ in states) + 3
    width, height = COLUMNS * 8.43 + 32, rows * line + 24
    texts = [
        f'<text x="16" y="{line + 14}"><tspan class="soft">$ </tspan>{html.escape(prompt)}</text>'
    ]
    for y, text, since, until in states:
        delays = f"{since:.2f}s" if until is None else f"{since:.2f}s,{until:.2f}s"
        kind = "e" if until is None else "s"
        texts.append(
            f'<text class="{kind}" style="animation-delay:{delays}" x="16" '
            f'y="{(y + 2) * line + 14}">{text}</text>'
        )
    rules = (
        f"text{{fill:var(--ink);font:{size}px ui-monospace,SFMono-Regular,Menlo,Consolas,"
        "'DejaVu Sans Mono',monospace;white-space:pre}"
        ".soft{fill:var(--soft)}.accent{fill:var(--accent)}.bold{font-weight:700}"
        "rect{fill:var(--box);stroke:var(--soft);stroke-opacity:.4}"
        ".s{visibility:hidden}"
        "@keyframes a{from,to{visibility:visible}}@keyframes b{from,to{visibility:hidden}}"
        "@media (prefers-reduced-motion:no-preference){"
        ".e,.s{visibility:hidden;animation-duration:1ms;"
        "animation-fill-mode:forwards}.e{animation-name:a}.s{animation-name:a,b}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" role="img">'
        f"<title>{html.escape(prompt)}, recorded</title>{style(rules)}"
        f'<rect x="1" y="1" width="{width - 2:.0f}" height="{height - 2}" rx="10"/>'
        f"{''.join(texts)}</svg>\n"
    )


# --------------------------------------------------------------------------- the page


@contextlib.contextmanager
def served(bundle: Path, *options: str) -> Iterator[str]:
    """Serve a bundle; yield the address.

    Raises:
        EdgeError: the server does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "edge.cli", "serve", str(bundle), "--port", str(port)]
    command += options
    with subprocess.Popen(command, cwd=ROOT) as server:
        try:
            deadline = time.monotonic() + START_S
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    raise EdgeError(f"{' '.join(command)} was not ready within {START_S} s")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()


@contextlib.contextmanager
def opened_page(url: str, *flags: str) -> Iterator[Any]:
    """Open a server's page; yield a `tests.edge_serve.http.browser.Browser`.

    Raises:
        EdgeError: Debian's chromium and chromium-driver are not installed.
    """
    from selenium import webdriver

    from tests.edge_serve.http.browser import FLAGS, Browser

    browser, service = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or service is None:
        raise EdgeError("there is no chromium; run: apt-get install chromium chromium-driver")
    options: Any = webdriver.ChromeOptions()
    options.binary_location = browser
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        with webdriver.Chrome(options, webdriver.ChromeService(service)) as driver:
            driver.set_window_size(1280, 860)
            driver.get(url)
            page = Browser(driver)
            page.started()
            page.open_panel()
            yield page


def wait_for_answer(page: Any) -> None:
    """Wait until the page's newest turn is a whole answer.

    Raises:
        EdgeError: it is not within `START_S`.
    """
    deadline = time.monotonic() + START_S
    while not page.all(".turn.assistant:last-child .facts span"):
        if time.monotonic() > deadline:
            raise EdgeError(f"no answer within {START_S} s; run this on an idle machine")
        time.sleep(0.1)


def photograph(url: str) -> None:
    """Ask a question on the page and keep screenshots, light and dark.

    Raises:
        EdgeError: there is no browser, or no answer.
    """
    with opened_page(url, "--force-device-scale-factor=1.5") as page:
        for name, value in (("temperature", "0"), ("max_tokens", "200")):
            page.one(f"[name={name}]").send_keys(value)
        page.ask(QUESTION)
        wait_for_answer(page)
        time.sleep(5)  # two updates of the dashboard
        driver = page.driver
        driver.execute_script("document.getElementById('engines').parentElement.scrollIntoView()")
        driver.execute_script("document.activeElement.blur()")
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            driver.save_screenshot(str(PICTURES / f"page-{scheme}.png"))


# --------------------------------------------------------------------------- all


def main(wanted: list[str]) -> None:
    """Make the pictures that are named, or all.

    Raises:
        EdgeError: an unknown name, or pictures that are too large together.
    """
    names = ("flow", "plan", "terminal", "page")
    unknown = set(wanted) - set(names)
    if unknown:
        raise EdgeError(
            f"there is no picture {', '.join(sorted(unknown))}; there are {', '.join(names)}"
        )
    PICTURES.mkdir(exist_ok=True)
    os.chdir(ROOT)
    for name in wanted or names:
        print(f"making {name}", flush=True)
        if name == "flow":
            (PICTURES / "flow.svg").write_text(flow(), "utf-8")
        elif name == "plan":
            target = str(PICTURES / "plan.svg")
            plan = ["plan", "deepseek-r1:1.5b", "--device", "agx-orin-64", "--svg", target]
            subprocess.run([sys.executable, "-m", "edge.cli", *plan], check=True)
        elif name == "terminal":
            moments = record(["scripts/quickstart"])
            (PICTURES / "quickstart.svg").write_text(
                animated("scripts/quickstart", moments), "utf-8"
            )
        else:
            with served(BUNDLE) as url:
                photograph(url)
    size = sum(path.stat().st_size for path in PICTURES.iterdir())
    if size > MOST_BYTES:
        raise EdgeError(
            f"the pictures take {size} bytes, more than {MOST_BYTES}; make smaller ones"
        )
    print(f"{size} bytes under {PICTURES.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EdgeError as error:
        sys.exit(f"pictures: {error}")
