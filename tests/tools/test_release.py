"""``python3 -m tools release``: one commit, the same bytes each time, a folder that is whole."""

from __future__ import annotations

import email.parser
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from edge_serve.cli.man import man_page
from tools.release import make as release
from tools.release import proof as release_proof
from tools.release.make import LOCKS, PLACEHOLDER, Commit
from tools.release.proof import Machine, ProofError, Row
from tools.release.targets import OWN_LOCK, SUMS, TARGETS, ReleaseError, Target

ROOT = Path(__file__).parents[2]
URL = "https://git.example.org/edge/llm.git"
FILES = {
    "pyproject.toml": """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "tiny"
dynamic = ["version"]
[tool.hatch.version]
path = "edge/_version.py"
[tool.hatch.build.targets.wheel]
packages = ["edge"]
[project.scripts]
""",
    "edge/_version.py": '__version__ = "1.2.3"\n',
    "CHANGELOG.md": "# Log\n\n## [Unreleased]\n\n- New.\n\n## [1.2.2] - 2026-01-01\n\n- Old.\n",
    "docs/orin.md": f"git clone {PLACEHOLDER}\n\n- `{PLACEHOLDER}` is an\n  address.\n- Other.\n",
    ".gitignore": "*.onnx\n",
    "edge_serve/__init__.py": "",
    "edge_serve/cli/__init__.py": "",
    "edge_serve/cli/man.py": "def man_page():\n    return '.TH TINY 1'\n",
}


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=x", "-c", "user.email=x@x")
    done = subprocess.run(
        ("git", *who, *arguments), cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit_all(root: Path) -> None:
    git(root, "add", "--force", ".")
    git(root, "commit", "--quiet", "--message", "x", "--date", "2026-02-03T04:05:06Z")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small project with one commit."""
    root = tmp_path / "repository"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "--quiet")
    commit_all(root)
    return root


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout as it is now, committed."""
    root = tmp_path_factory.mktemp("checkout")
    for name in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    git(root, "init", "--quiet")
    commit_all(root)
    return root


@pytest.fixture(scope="module")
def made(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Commit, Path, Path]:
    """The commit, what was built of it, and the folder without libraries and SBOMs."""
    work = tmp_path_factory.mktemp("work")
    commit = release.read_commit(checkout)
    tree, built = release.build_twice(commit, work, URL, checkout)
    folder = work / commit.name
    release.write_folder(tree, built, folder, commit, is_offline=True, is_signed=False)
    release.write_sums(folder)
    return commit, built, folder


def test_a_checkout_with_changes_is_refused(repository: Path):
    assert release.read_commit(repository).version == "1.2.3"
    (repository / "docs/orin.md").write_text("changed")
    (repository / "new.md").touch()
    with pytest.raises(ReleaseError, match=r"2 files differ .* docs/orin\.md, new\.md; commit"):
        release.read_commit(repository)


def test_a_version_is_released_once(repository: Path):
    git(repository, "tag", "-m", "x", "v1.2.3")
    release.read_commit(repository)  # the same commit again
    (repository / "docs/orin.md").write_text("changed")
    commit_all(repository)
    with pytest.raises(ReleaseError, match=r"tag v1\.2\.3 is commit .* raise the version"):
        release.read_commit(repository)


@pytest.mark.parametrize("top", ["Unreleased", "1.2.3", "1.2.4"])
def test_the_top_of_the_changelog_becomes_the_notes(top: str, repository: Path, tmp_path: Path):
    commit = release.read_commit(repository)
    tree = tmp_path / "tree"
    release.write_tree(commit, tree, repository)
    changelog = tree / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("Unreleased", top))
    if top == "1.2.4":
        with pytest.raises(ReleaseError, match=r"version is 1\.2\.3, and .* is \[1\.2\.4\]"):
            release.edit_tree(tree, commit, None)
        return
    release.edit_tree(tree, commit, None)
    assert f"## [1.2.3] - {commit.date}\n\n- New.\n" in changelog.read_text()
    notes = release.read_notes(tree, commit)
    assert notes.startswith(f"# edge-llm 1.2.3, {commit.date}\n\nMade from commit {commit.id}.\n")
    assert notes.endswith("\n\n- New.\n")
    assert PLACEHOLDER in (tree / "docs/orin.md").read_text()


def test_the_address_is_written_where_it_is_missing(repository: Path, tmp_path: Path):
    commit = release.read_commit(repository)
    release.write_tree(commit, tmp_path / "tree", repository)
    release.edit_tree(tmp_path / "tree", commit, URL)
    assert (tmp_path / "tree/docs/orin.md").read_text() == f"git clone {URL}\n\n- Other.\n"
    assert (
        f'[project.urls]\nRepository = "{URL}"\n' in (tmp_path / "tree/pyproject.toml").read_text()
    )


@pytest.mark.parametrize(
    "url", [URL, "git@host:edge/llm.git", "ssh://git@host/llm", "file:///srv/x"]
)
def test_an_address_that_git_clones_is_accepted(url: str):
    assert release.check_repository(url) == url


@pytest.mark.parametrize("url", ["", "llm", "https://a b", 'https://a"b', "host/llm.git"])
def test_an_address_that_git_does_not_clone_is_refused(url: str):
    with pytest.raises(ReleaseError, match="git remote get-url origin"):
        release.check_repository(url)


def test_bytes_that_differ_from_build_to_build_are_no_release(repository: Path, tmp_path: Path):
    (repository / "hatch_build.py").write_text(
        "import os, pathlib\n"
        "from hatchling.builders.hooks.plugin.interface import BuildHookInterface\n"
        "class Hook(BuildHookInterface):\n"
        "    def initialize(self, version, build_data):\n"
        "        pathlib.Path('edge/made.py').write_text(str(os.environ.get('TZ')))\n"
    )
    with (repository / "pyproject.toml").open("a") as file:
        file.write("[tool.hatch.build.hooks.custom]\n")
    commit_all(repository)
    commit = release.read_commit(repository)
    with pytest.raises(ReleaseError, match=r"built twice, these differ: tiny-1\.2\.3-.*whl"):
        release.build_twice(commit, tmp_path / "work", None, repository)


def test_an_sdist_without_a_tracked_file_is_no_release(repository: Path, tmp_path: Path):
    (repository / "edge/golden.onnx").touch()  # ignored, and tracked all the same
    commit_all(repository)
    commit = release.read_commit(repository)
    with pytest.raises(ReleaseError, match=r"the sdist lacks edge/golden\.onnx"):
        release.build_twice(commit, tmp_path / "work", None, repository)


@pytest.mark.slow
def test_the_real_checkout_builds_to_the_same_bytes(made: tuple[Commit, Path, Path]):
    """`build_twice` has compared two places, times, umasks, time zones, locales and hash seeds."""
    commit, built, _ = made
    names = {path.name for path in built.iterdir()}
    stem = f"jetson_edge_llm-{commit.version}"
    assert names == {f"{stem}-py3-none-any.whl", f"{stem}.tar.gz"}
    with zipfile.ZipFile(built / f"{stem}-py3-none-any.whl") as wheel:
        metadata = wheel.read(f"{stem}.dist-info/METADATA").decode()
        manual = wheel.read(f"{stem}.data/data/share/man/man1/edge-llm.1").decode()
    assert manual == man_page()
    headers = email.parser.Parser().parsestr(metadata, headersonly=True)
    assert headers["Version"] == commit.version
    assert headers.get_all("Project-URL") == [f"Repository, {URL}"]


@pytest.mark.slow
def test_a_release_names_its_own_wheel_by_hash(made: tuple[Commit, Path, Path]):
    """pip itself checks it, from the folder alone."""
    _, built, folder = made
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    pip += ["--no-deps", "--no-index", "--require-hashes", "--find-links", ".", "-r", OWN_LOCK]
    run = partial(subprocess.run, check=False, capture_output=True, text=True)
    there = folder.parent / "there"
    done = run([*pip, "--dest", str(there)], cwd=folder)
    assert done.returncode == 0, done.stderr
    (wheel,) = built.glob("*.whl")
    assert [path.name for path in there.iterdir()] == [wheel.name]
    lock = (folder / OWN_LOCK).read_text()
    damaged = folder.parent / "damaged.txt"
    damaged.write_text(re.sub(r"sha256:[0-9a-f]{2}", "sha256:zz", lock).replace("zz", "00"))
    if damaged.read_text() == lock:
        damaged.write_text(lock.replace("sha256:00", "sha256:11"))
    done = run([*pip[:-1], str(damaged), "--dest", str(folder.parent / "nowhere")], cwd=folder)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


@pytest.mark.slow
def test_images_are_made_of_the_wheel_and_of_nothing_else(made: tuple[Commit, Path, Path]):
    _, built, folder = made
    (wheel,) = built.glob("*.whl")
    sent = (folder / ".dockerignore").read_text().splitlines()
    assert sent[1:] == ["*", f"!{wheel.name}", "!requirements", "!scripts/install-pycuda"]
    dockerfiles = sorted((folder / "docker/jetson").glob("Dockerfile.*"))
    assert len(dockerfiles) == 2
    for path in dockerfiles:
        text = path.read_text()
        assert "pyproject" not in text
        assert "no-build-isolation" not in text
        assert f"COPY {wheel.name} /src/\n" in text
        assert f"--find-links /src -r /src/{OWN_LOCK}\n" in text
        original = (ROOT / "docker/jetson" / path.name).read_text()
        assert text.split(" AS runtime")[1] == original.split(" AS runtime")[1]


@pytest.mark.slow
def test_a_recipe_that_copies_something_else_is_no_release(
    made: tuple[Commit, Path, Path], tmp_path: Path
):
    folder = tmp_path / "folder"
    shutil.copytree(ROOT / "docker", folder / "docker")
    path = folder / "docker/jetson/Dockerfile.jp62"
    path.write_text(path.read_text().replace("USER", "COPY secrets /src/\nUSER", 1))
    with pytest.raises(ReleaseError, match=r"Dockerfile\.jp62 copies .*secrets"):
        release.edit_recipes(folder, "x.whl")
    path.write_text(path.read_text().replace("COPY pyproject.toml", "COPY setup.py"))
    with pytest.raises(ReleaseError, match="0 times, not once"):
        release.edit_recipes(folder, "x.whl")


_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.slow
def test_links_lead_to_files_of_the_release_or_of_its_source(made: tuple[Commit, Path, Path]):
    """A reader of the folder finds what its first pages name; other pages may name the source."""
    _, _, folder = made
    missing: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.md")):
        for link in _LINK.findall(
            re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
        ):
            if not link.startswith("http") and not (path.parent / link).exists():
                missing.setdefault(path.relative_to(folder).as_posix(), set()).add(link)
    for name in ("INSTALL.md", "README.md", "RELEASE_NOTES.md", "docs/orin.md", "docs/service.md"):
        assert (folder / name).is_file()
        assert name not in missing
    for name, links in missing.items():
        assert all(((ROOT / name).parent / link).resolve().exists() for link in links), name


@pytest.mark.slow
def test_nothing_in_a_release_is_left_to_be_filled_in(made: tuple[Commit, Path, Path]):
    _, _, folder = made
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in (".whl", ".gz", ".png", ".xz"):
            assert PLACEHOLDER not in path.read_text("utf-8"), path
    assert f"git clone {URL} edge-llm" in (folder / "docs/orin.md").read_text()


def test_a_placeholder_of_the_checkout_has_a_command_that_fills_it():
    """One, in one place: the page says beside it what prints the address."""
    named = git(
        ROOT, "grep", "-lE", r"(URL|NAME|ADDRESS)_OF_|YOUR_[A-Z]|<your|CHANGE_?ME", "--", "."
    )
    ours = {"tools/release/make.py", "tests/tools/test_release.py"}
    assert set(named.splitlines()) - ours == {"docs/orin.md"}
    page = (ROOT / "docs/orin.md").read_text()
    assert page.count(PLACEHOLDER) == 2
    assert f"- `{PLACEHOLDER}` is what `git remote get-url origin` prints" in page


@pytest.mark.slow
@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("is_offline", [False, True])
def test_the_commands_of_the_install_page_are_those_of_the_folder(
    is_offline: bool, is_signed: bool, made: tuple[Commit, Path, Path], tmp_path: Path
):
    commit, built, _ = made
    shutil.copytree(built, tmp_path / "folder")
    release.write_install_page(
        tmp_path / "folder", commit, is_offline=is_offline, is_signed=is_signed
    )
    page = (tmp_path / "folder/INSTALL.md").read_text()
    check, laptop, jetson = release_proof.read_commands(page)
    assert check.splitlines()[-1] == f"sha256sum --check --quiet {SUMS}"
    assert check.startswith("minisign -Vm") == is_signed
    for script, lock in ((laptop, "laptop"), (jetson, "jetpack7")):
        subprocess.run(["bash", "-n", "-c", script], check=True)
        assert (f"--no-index --find-links wheels/{lock} --find-links . " in script) == is_offline
        assert f"-r requirements/{lock}.txt -r {OWN_LOCK}\n" in script
        assert "--no-deps --require-hashes" in script
    assert ("`wheels/`" in page) == is_offline
    assert commit.id in page


@pytest.mark.slow
def test_checksums_are_of_every_file_and_sha256sum_takes_them(
    made: tuple[Commit, Path, Path], tmp_path: Path
):
    folder = tmp_path / "folder"
    shutil.copytree(made[2], folder)
    release.write_sums(folder)
    before = (folder / SUMS).read_bytes()
    release.write_sums(folder)
    assert (folder / SUMS).read_bytes() == before
    machine = Machine(tmp_path, folder)
    release_proof.is_whole(machine)
    (folder / "wheels").mkdir()
    (folder / "wheels/extra.whl").touch()
    with pytest.raises(ProofError, match=r"differ in \['wheels/extra\.whl'\]"):
        release_proof.is_whole(machine)
    (folder / "wheels/extra.whl").unlink()
    with (folder / "README.md").open("a") as file:
        file.write("x")
    with pytest.raises(ProofError, match=r"README\.md: FAILED"):
        release_proof.is_whole(machine)


@pytest.mark.live
def test_checksums_are_signed_and_the_signature_is_verified(tmp_path: Path):
    if shutil.which("minisign") is None:
        pytest.skip("needs Debian's package minisign")
    for name in ("a", "b"):
        keys = ["-s", str(tmp_path / f"{name}.key"), "-p", str(tmp_path / f"{name}.pub")]
        subprocess.run(["minisign", "-G", "-W", *keys], check=True, capture_output=True)
    commit = Commit("0" * 40, 1_700_000_000, "1.2.3")
    (tmp_path / "x.txt").touch()
    release.write_sums(tmp_path)
    release.sign(tmp_path, commit, tmp_path / "a.key", tmp_path / "a.pub")
    signature = tmp_path / f"{SUMS}.minisig"
    assert f"trusted comment: edge-llm 1.2.3 {commit.id}" in signature.read_text()
    before = signature.read_bytes()
    release.sign(tmp_path, commit, tmp_path / "a.key", tmp_path / "a.pub")
    assert signature.read_bytes() == before  # it has no time
    with pytest.raises(ReleaseError, match=r"does not verify by .*b\.pub what it signed"):
        release.sign(tmp_path, commit, tmp_path / "a.key", tmp_path / "b.pub")


def test_a_release_names_no_place_of_this_machine(repository: Path, tmp_path: Path):
    """But what the commit names anyway, also if the checkout is there."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.json").write_text("/home/alice/x")

    def check(*places: str) -> None:
        commit = release.read_commit(repository)
        release.check_traces(folder, commit, *map(Path, places), root=repository)

    check("/home/bob")
    with pytest.raises(ReleaseError, match=r"a\.json names /home/alice"):
        check("/home/bob", "/home/alice")
    (repository / "docs/orin.md").write_text("copy it to /home/alice\n")
    commit_all(repository)
    check("/home/bob", "/home/alice")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.lock)
def test_each_python_gets_one_version_of_each_library(target: Target):
    text = (ROOT / "requirements" / f"{target.lock}.txt").read_text("utf-8")
    versions = {}
    for python in target.pythons:
        entries = release.lock_for(text, python, target.machine)
        lines = re.findall(r"^([\w.-]+)==(\S+)", entries, re.MULTILINE)
        versions[python] = dict(lines)
        assert len(lines) == len(versions[python])
        assert entries.count("--hash=sha256:") >= len(lines)
        assert ("tomli" in versions[python]) == (python == "3.10")
        assert "colorama" not in versions[python]  # it is for Windows
        old = python == "3.10"
        assert versions[python]["onnxruntime"].startswith("1.23.") == old
    assert target.lock in LOCKS


def test_an_entry_that_pip_could_not_hash_is_no_lock():
    good = (
        "a==1 ; python_version < '3.11' \\\n    --hash=sha256:00\nb==2 \\\n    --hash=sha256:11\n"
    )
    assert release.lock_for(good, "3.12", "x86_64") == "b==2 \\\n    --hash=sha256:11\n"
    assert "a==1 \\\n" in release.lock_for(good, "3.10", "x86_64")
    with pytest.raises(ReleaseError, match="not NAME==VERSION with hashes"):
        release.lock_for(good + "c==3\n", "3.12", "x86_64")


def test_pip_chooses_by_the_glibc_of_the_target():
    by_lock = {target.lock: list(target.platforms()) for target in TARGETS}
    assert by_lock["jetpack6"][0] == "manylinux_2_35_aarch64"  # Ubuntu 22.04
    assert by_lock["jetpack7"][0] == "manylinux_2_39_aarch64"  # Ubuntu 24.04
    assert by_lock["laptop"][-2:] == ["manylinux_2_17_x86_64", "manylinux2014_x86_64"]


def test_a_newcomer_has_nothing_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("VIRTUAL_ENV", str(ROOT / ".venv"))
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror/simple")
    printed = Machine(tmp_path, tmp_path).run("env; pwd")
    assert str(ROOT) not in printed
    assert "PIP_INDEX_URL=https://mirror/simple" in printed
    assert printed.splitlines()[-1] == str(tmp_path)
    with pytest.raises(ProofError, match=r"'exit 7' ends with 7"):
        Machine(tmp_path, tmp_path).run("exit 7")


def test_a_python_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    name = tmp_path / f"versions/{here}.1/bin/python{here}"
    name.parent.mkdir(parents=True)
    name.symlink_to(sys.executable)
    assert set(release_proof.find_pythons((here,))) == {here}
    with pytest.raises(ReleaseError, match=r"python3\.2 is not here; install it"):
        release_proof.find_pythons((here, "3.2"))


def test_steps_after_a_failure_are_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def fails(machine: Machine) -> None:
        raise ProofError("the reason")

    asked = []
    steps = (("one", lambda machine: asked.append(machine)), ("two", fails), ("three", fails))
    monkeypatch.setattr(release_proof, "STEPS", steps)
    monkeypatch.setattr(release_proof, "resolves", lambda *arguments, **options: None)
    python = Path(sys.executable)
    pythons = {"3.11": python, "3.12": python}
    rows = release_proof.prove(tmp_path, tmp_path / "work", pythons, is_offline=True)
    assert [(row.name, row.python, row.reason) for row in rows] == [
        ("one", "3.11", ""),
        ("two", "3.11", "the reason"),
        ("one", "3.12", ""),
        ("two", "3.12", "the reason"),
        ("pip resolves jetpack7", "3.12", ""),
    ]
    assert asked[0].home != asked[1].home
    ends = [line.split()[-1] for line in release_proof.render(rows).splitlines()]
    assert ends == ["ok", "FAILED", "ok", "FAILED", "ok"]


@pytest.mark.slow
def test_a_release_with_a_failed_proof_has_no_name(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    rows = [Row("one", "3.12", 1.0, "")]
    for name in ("lint_recipes", "write_sboms"):
        monkeypatch.setattr(release, name, lambda *_: None)
    monkeypatch.setattr(release, "write_folder", lambda _, __, folder, *a, **b: folder.mkdir())
    monkeypatch.setattr(release, "read_commit", partial(release.read_commit, repository))
    monkeypatch.setattr(release, "build_twice", partial(release.build_twice, root=repository))
    monkeypatch.setattr(release_proof, "find_pythons", dict)
    monkeypatch.setattr(release_proof, "prove", lambda *arguments, **options: rows)
    options = ["--out", str(tmp_path / "out"), "--no-wheels"]
    (tmp_path / "out").mkdir()
    rows.append(Row("two", "3.12", 1.0, "the reason"))
    assert release.main(options) == 1
    assert "1 of 2 proofs failed" in (error := capsys.readouterr().err)
    assert "two, Python 3.12: the reason" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["edge-llm-1.2.3.unproven"]
    rows.pop()
    assert release.main(options) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["edge-llm-1.2.3"]
    assert release.main(options) == 1
    assert "is there already; remove it, or name another --out" in capsys.readouterr().err
    options[1] = str(tmp_path / "other")
    for more, reason in (
        (["--public-key", "x"], "--public-key has no effect without --sign"),
        (
            ["--sign", "no.key"],
            "needs minisign" if not shutil.which("minisign") else "no.key is no file",
        ),
    ):
        assert release.main([*options, *more]) == 1
        assert reason in capsys.readouterr().err


def test_every_library_that_the_proofs_resolve_is_an_extra_of_the_locks():
    """What `resolves` asks of a Jetson is what ``tools/lock`` locks for one."""
    lock = (ROOT / "tools/lock").read_text()
    locked = re.findall(r"--extra (\w+)", lock.split("what=(pyproject.toml", 1)[1].split(")")[0])
    source = Path(release_proof.__file__).read_text()
    found = re.search(r'extras = "\[(.+)\]=="', source)
    assert found
    assert Requirement(f"x[{found[1]}]").extras == set(locked)
