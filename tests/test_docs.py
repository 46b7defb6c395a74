"""The documentation against the code: commands, options, links, Python, messages, tables."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections import Counter
from pathlib import Path

import click
import pytest

import edge.errors
from edge import cli
from edge.bundle import io_spec
from edge.bundle.manifest import Dialect
from edge.cli.options import take_engine, take_sampling
from edge.errors import EXIT_GATE_MISSED, EdgeError
from edge_make.families import FAMILIES
from lab import __main__ as lab
from tests.conftest import Bundles
from tests.documents import FENCE, ROOT, SPAN, blocks, rows, spans
from tests.makers.manifests import make_model
from tests.packages import PACKAGES
from tools import __main__ as tools

README = ROOT / "README.md"
CHINESE = ROOT / "README.zh-CN.md"
INDEX = ROOT / "docs" / "README.md"
DESIGN = ROOT / "docs" / "design.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
DOCS = [README, CHINESE, *OTHERS]

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_AS_ROOT = re.compile(r"^(?:sudo )?(?:/\S+/bin/)?(?=edge-llm )")
_ELLIPSIS = "…"


def commands() -> list[tuple[str, str]]:
    """Every ``edge-llm ...`` with arguments: ``(document, command line)``."""
    found = []
    for path in DOCS:
        lines = "".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
        lines = [_AS_ROOT.sub("", line) for line in lines]
        found += [(path.name, line) for line in [*lines, *spans(path)] if _is_command(line)]
    return found


def _is_command(line: str) -> bool:
    return re.match(r"edge-llm +\S", line) is not None and not line.startswith("edge-llm: ")


@functools.cache
def verbs() -> dict[str, click.Command]:
    context = click.Context(cli.cli)
    found = {name: cli.cli.get_command(context, name) for name in cli.cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


@functools.cache
def all_flags() -> frozenset[str]:
    """Every long option of the command, its verbs, and those of a verb that has some."""
    flags = {"--help", "--help-all"}
    waiting: list[click.Command] = [cli.cli, *verbs().values()]
    while waiting:
        command = waiting.pop()
        for parameter in command.params:
            flags.update(parameter.opts, parameter.secondary_opts)
        if isinstance(command, click.Group):
            waiting.extend(command.commands.values())
    return frozenset(flags)


def test_the_documents_show_every_verb():
    shown = {shlex.split(line)[1] for _, line in commands()}
    assert set(verbs()) <= shown


def test_the_readme_shows_eight_verbs_and_names_real_ones():
    text = README.read_text("utf-8")
    table = [cells[0] for cells in rows(text) if cells[0].startswith("`edge-llm ")]
    assert len(table) == 8
    [others] = re.findall(r"`edge-llm --help` lists the others:(.*?)\n\n", text, re.DOTALL)
    named = {span for span in SPAN.findall(others) if " " not in span and span[0] != "-"}
    assert len(named) > 10
    assert named | {cell.strip("`").split()[1] for cell in table} <= set(verbs())


@pytest.mark.parametrize(("document", "line"), commands())
def test_every_command_parses(
    document: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As far as the parser goes: options, their values, and what the library checks of them."""
    monkeypatch.chdir(tmp_path)
    line = re.sub(r"/(?:var/lib|etc)/edge-llm/", "", line)  # a device's directories
    _, verb, *arguments = shlex.split(re.split(r" (?:<|>>|\|) ", line)[0], comments=True)
    if verb.startswith("-"):
        assert verb in all_flags(), f"{document}: {line}"
        return
    if verb == "COMMAND" or not arguments:
        assert verb in {"COMMAND", *verbs()}, f"{document}: {line}"
        assert set(arguments) <= all_flags(), f"{document}: {line}"
        return
    for argument in arguments:
        if argument in ("BUNDLE", "ENGINE") or argument.startswith("bundles/"):
            (tmp_path / argument).mkdir(parents=True, exist_ok=True)
        elif argument.endswith(("fleet.toml", "r1.toml", ".txt")):
            (tmp_path / argument).touch()
        elif argument == "1.5b":
            bundle = tmp_path / "bundles" / "deepseek-r1-distill-qwen-1.5b-int4"
            bundle.mkdir(parents=True, exist_ok=True)
            (bundle / "manifest.json").touch()
    command = verbs()[verb]
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        _, found, arguments = command.resolve_command(click.Context(command), arguments)
        assert found is not None, f"{document}: {line}"
        command = found
        if not arguments:
            return
    try:
        context = command.make_context(verb, list(arguments))
    except (click.UsageError, EdgeError) as error:
        pytest.fail(f"{document}: {line}: {error}")
    with context:
        params = dict(context.params)
        if verb == "export":
            from export.pipeline import ExportConfig

            del params["as_json"], params["dry_run"]
            fast, best = params.pop("fast"), params.pop("best")
            # It refuses what contradicts itself.
            ExportConfig(**params, named="fast" if fast else "best" if best else "default")
        elif verb in ("run", "chat"):
            take_sampling(params)
        if "num_threads" in params:  # a verb that opens a bundle
            take_engine(params)


def test_an_update_builds_before_the_link_moves():
    """Else a service on a GPU goes on with the CPU."""
    [update] = [block for block in blocks(ROOT / "docs/service.md", "sh") if "mv -fT" in block]
    assert update.index("edge-llm build") < update.index("mv -fT")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_flag_exists(path: Path):
    named = {flag for span in spans(path) if span.startswith("--") for flag in _FLAG.findall(span)}
    if path == TROUBLESHOOTING:
        named = set(_FLAG.findall(path.read_text("utf-8")))
        assert named
    assert named <= all_flags()


def _anchors(path: Path) -> set[str]:
    """Anchors of the headings, by GitHub's rule (unique headings only)."""
    text = FENCE.sub("", path.read_text("utf-8"))
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(slugs) == len(set(slugs)) or path.name == "CHANGELOG.md", f"{path}: twice the same"
    return set(slugs)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_relative_link_resolves(path: Path):
    for target in _LINK.findall(FENCE.sub("", path.read_text("utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in _anchors(file), f"{path.name} links to {target}"


def test_the_index_leads_to_every_page():
    led_to = {target.partition("#")[0] for target in _LINK.findall(INDEX.read_text("utf-8"))}
    assert {path.name for path in ROOT.glob("docs/*.md")} - led_to == {INDEX.name}
    assert "docs/README.md" in _LINK.findall(README.read_text("utf-8"))
    sections = INDEX.read_text("utf-8").split("\n## ")[1:]
    assert len(sections) == 5
    for section in sections:
        _, *steps = section.strip().splitlines()
        assert [step.split()[0] for step in steps if step] == [
            f"{n}." for n in range(1, len(steps))
        ]


_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def test_the_readme_says_the_same_in_chinese():
    """The same sections, commands, figures, code and links; the words are the translator's."""
    texts = [path.read_text("utf-8") for path in (README, CHINESE)]
    bare = [FENCE.sub("", text) for text in texts]
    for found in (
        [FENCE.findall(text) for text in texts],
        [re.findall(r"^#+", text, re.MULTILINE) for text in bare],
        [[line.count("|") for line in text.splitlines() if line[:1] == "|"] for text in bare],
        [Counter(SPAN.findall(text)) for text in bare],
        [Counter(_NUMBER.findall(text)) for text in bare],
        [
            Counter(
                re.sub(r"\.zh-CN(?=\.md)|(?<=^#).*", "", target)  # each has its own headings
                for target in set(re.findall(r'(?:\]\(|src(?:set)?=")([^)"\s]+)', text))
            )
            for text in bare
        ],
    ):
        assert found[0] == found[1]
    assert all(
        f"]({path.name})" in text for text, path in zip(bare, (CHINESE, README), strict=True)
    )
    sentences = [
        line for line in bare[1].splitlines() if len(line) > 60 and line.lstrip()[:1] not in "<|"
    ]
    assert [line for line in sentences if not re.search("[\u4e00-\u9fff]", line)] == []


_ROOMS = r"edge(?:_\w+)?|engines(?!/NAME)|export|lab|scripts|tests|tools|docs|\.ci"
_PATH = re.compile(rf"(?:{_ROOMS})/[\w./-]*")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_named_file_exists(path: Path):
    named = [span for span in spans(path) if _PATH.fullmatch(span)]
    assert [span for span in named if not (ROOT / span).exists()] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_named_program_exists(path: Path):
    programs = {"lab": lab.PROGRAMS, "tools": tools.PROGRAMS}
    named = re.findall(r"python3 -m (lab|tools) ([a-z][\w-]*)", path.read_text("utf-8"))
    assert [name for package, name in named if name not in programs[package]] == []


def test_python_of_the_readme_runs(
    tiny_bundles: Bundles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """With a tiny model in place of the one that it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGE_LLM_BUNDLES", raising=False)
    bundle = Path("bundles/deepseek-r1-distill-qwen-1.5b-int4")
    bundle.parent.mkdir()
    bundle.symlink_to(tiny_bundles("qwen2", quant="int4"))
    python = blocks(README, "python")
    assert python
    for source in python:
        assert bundle.name in source or "DeepSeekModel" in source
        exec(compile(source, str(README), "exec"), {})
        assert capsys.readouterr().out.strip()


_API = re.compile(r"(LLM|DeepSeekModel|SamplingParams|EngineConfig)\.(\w+)")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_named_call_and_metric_exists(path: Path):
    named = [(span, found) for span in spans(path) if (found := _API.match(span))]
    assert [span for span, found in named if not hasattr(getattr(edge, found[1]), found[2])] == []
    metrics = {name for span in spans(path) for name in re.findall(r"\bedgellm_\w+", span)}
    assert {name for name in metrics if not _is_metric(name)} == set()


def _is_metric(name: str) -> bool:
    """Whether the server has it, perhaps with what Prometheus adds to counters and histograms."""
    bare = re.sub(r"_(total|bucket|info)$", "", name.removeprefix("edgellm_"))
    return f'"{bare}"' in _metric_source() or f'"edgellm_{bare}"' in _metric_source()


@functools.cache
def _metric_source() -> str:
    return "".join(p.read_text("utf-8") for p in (ROOT / "edge_serve/observe").glob("*.py"))


def _error_classes() -> dict[str, type[EdgeError]]:
    return {
        name: value
        for name, value in vars(edge.errors).items()
        if isinstance(value, type) and issubclass(value, EdgeError)
    }


def test_exit_codes_are_those_of_the_errors():
    section = TROUBLESHOOTING.read_text("utf-8").split("## Exit codes")[1].split("\n## ")[0]
    listed = [(int(code), name.strip("`")) for code, name, _ in rows(section)]
    classes = _error_classes()
    assert {name: code for code, name in listed if name} == {
        name: error.exit_code for name, error in classes.items()
    }
    assert sorted(code for code, name in listed if not name) == [0, 77, 78, 130]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_exit_codes_in_prose_exist(path: Path):
    known = {error.exit_code for error in _error_classes().values()} | {0, 1, 130}
    known.add(EXIT_GATE_MISSED)
    named = re.findall(r"\b(?:[Ee]xit )?[Cc]ode\s+(\d+)", path.read_text("utf-8"))
    assert {int(code) for code in named} <= known


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (click.UsageError("no such option"), 64),
        (KeyboardInterrupt(), 130),
        (edge.errors.BackendError("broken"), 70),
        (edge.errors.ContextLengthError(9, 8), 65),
    ],
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_the_command_leaves_with_these_codes(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
):
    def fail(_context: click.Context) -> None:
        raise raised

    monkeypatch.delenv("EDGE_LLM_TRACEBACK", raising=False)
    monkeypatch.setattr("sys.argv", ["edge-llm", "fail"])
    monkeypatch.setattr(cli.cli, "invoke", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code


@functools.cache
def _message_texts() -> str:
    """All string literals of the packages, values in f-strings as an ellipsis."""
    texts = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    texts.append("".join(_literal(part) for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def _literal(part: ast.expr) -> str:
    return part.value if isinstance(part, ast.Constant) else _ELLIPSIS  # type: ignore[return-value]


@pytest.mark.slow
def test_every_message_of_troubleshooting_is_in_the_code():
    section = TROUBLESHOOTING.read_text("utf-8").split("## Installation")[1]
    messages = [cells[0].strip("`") for cells in rows(section)]
    assert len(messages) > 30
    # A value that the code composes from parts is an ellipsis there, whatever stands here.
    pieces = ", ".join(family.model_class for family in FAMILIES.values())
    found = _message_texts()
    assert [m for m in messages if m.replace(pieces, _ELLIPSIS) not in found] == []


@pytest.mark.parametrize("dialect", ["native", "portable"])
def test_tensor_tables_are_the_contract(dialect: Dialect):
    names = {3: "hidden", 5: "kv_heads", 7: "head_dim", 11: "vocab", 13: "capacity"}
    model = make_model(num_layers=1, hidden_size=3, num_kv_heads=5, head_dim=7, vocab_size=11)
    expected = []
    for direction, specs in (
        ("in", io_spec.decoder_inputs(model, dialect, "fp16", 13)),
        ("out", io_spec.decoder_outputs(model, dialect, "fp16", 13)),
    ):
        for spec in specs:
            shape = ", ".join(names[size] if isinstance(size, int) else size for size in spec.shape)
            dtype = "float" if spec.dtype == "fp16" else spec.dtype
            name = spec.name.replace(".0.", ".i.")
            expected.append([direction, f"`{name}`", f"[{shape}]", dtype])
    section = DESIGN.read_text("utf-8").split(f"### Dialect `{dialect}`")[1].split("\n### ")[0]
    assert [cells[:4] for cells in rows(section)] == expected
    assert f"Opset {io_spec.DIALECTS[dialect].opset}" in section
