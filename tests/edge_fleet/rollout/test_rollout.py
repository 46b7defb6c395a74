"""A device's roll-out, with a real registry and a real service on loopback."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.error import HTTPError

import msgspec
import pytest
import uvicorn

from edge.bundle import trust
from edge.bundle.engine_records import RECORDS_VARIABLE, built_here
from edge.bundle.manifest import fingerprint, read_manifest
from edge.bundle.release import Release
from edge.engine_config import EngineConfig
from edge.errors import (
    BackendError,
    BuildError,
    BundleError,
    ConfigError,
    DependencyError,
    GateError,
    RegistryError,
    ResourceError,
)
from edge_fleet.registry.client import Registry
from edge_fleet.registry.pull import look, pull
from edge_fleet.registry.push import push
from edge_fleet.registry.reference import parse_reference
from edge_fleet.rollout import journal as journals
from edge_fleet.rollout import service as services
from edge_fleet.rollout import steps
from edge_fleet.rollout.journal import MAX_TRIALS, Place
from edge_fleet.rollout.judge import LEAST_RIGHT, Candidate
from edge_fleet.rollout.service import Sight, _fault, _late
from edge_fleet.rollout.steps import Outcome, recover, roll_back, roll_out
from edge_fleet.signing import sign_bundle
from edge_fleet.waves.receiver import State, make_app
from edge_fleet.waves.wanted import Wanted, seal
from edge_lab.doctor.machine import Library, Machine
from edge_lab.measure.watch import _WORDS, GoldenItem
from edge_lab.measure.watch_server import ServerAnswerer
from edge_lab.telemetry import Snapshot
from edge_make.manifest_bytes import encode_manifest
from tests.conftest import Bundles
from tests.edge_fleet.registry.live import LiveRegistry
from tests.makers.keys import make_key
from tests.makers.manifests import replace_file
from tests.ports import free_port
from tests.standins.tensorrt import write_engine

from .killed import make_gate, make_plan

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("rollout")]


class Device:
    """A service on a link to a bundle, and a registry with newer ones."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.registry = LiveRegistry(folder)
        self.root = folder / "bundles"
        self.root.mkdir()
        self.bundle = bundle
        self.link = self.root / "r1"
        shutil.copytree(bundle, self.root / "r1-first")
        self.link.symlink_to("r1-first")
        self.port = free_port()
        config = folder / "r1.toml"
        config.write_text(
            f'port = {self.port}\nbackend = "ort-cpu"\nkv_capacity = 128\nnum_slots = 2\n'
            f'[model]\nr1 = "{self.link}"\n'
        )
        self.log = (folder / "serve.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge.cli", "serve", "--config", config],
            stdout=self.log,
            stderr=self.log,
        )
        self.golden = folder / "golden.jsonl"
        (folder / "text.txt").write_text("The cat sat on the mat, and the rain went on. " * 5)
        self.answerer = ServerAnswerer(f"http://127.0.0.1:{self.port}")
        self.service = services.Service(self.answerer, None)
        self.folder = folder
        self._versions = 0

    def write_golden(self) -> None:
        """Expect what the model answers, where that has words; these are its right answers."""
        rows: list[dict[str, Any]] = []
        for prompt in (f"question {n}" for n in range(200)):
            lines = [row for row in self.answerer.answer(prompt, 12).text.splitlines() if row]
            words = _WORDS.findall(lines[-1]) if lines else []
            if words:
                rows.append({"id": prompt, "prompt": prompt, "answer": " ".join(words)})
            if len(rows) == LEAST_RIGHT + 1:
                break
        self.golden.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.registry.kill()

    @property
    def reload(self) -> str:
        return f"kill -HUP {self.process.pid}"

    def arguments(self, reference: str) -> list[str]:
        url = f"http://127.0.0.1:{self.port}"
        return [reference, str(self.link), url, self.reload, str(self.golden)]

    def plan(self, reference: str, **changes: Any) -> steps.Plan:
        return make_plan(self.arguments(reference), **changes)

    def offer(self, *, bad: bool = False, key: Any = None, release: Release | None = None) -> str:
        """Push a bundle that is new and answers as before, or a bad one that ends at once."""
        self._versions += 1
        new = self.folder / f"v{self._versions}"
        shutil.copytree(self.bundle, new)
        replace_file(new, "generation_config.json", b'{"version": %d}' % self._versions)
        if bad:
            manifest = read_manifest(new)
            tokens = msgspec.structs.replace(manifest.tokens, eos=tuple(range(256)))
            changed = msgspec.structs.replace(manifest, tokens=tokens)
            (new / "manifest.json").write_bytes(encode_manifest(changed))
        if key is not None:
            sign_bundle(new, key, "ours", release)
        reference = parse_reference(f"{self.registry.address}/models/r1:{new.name}")
        with Registry(reference) as registry:
            push(new, reference, registry)
        return str(reference)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Have root's part done as the units do: by a process of its own, for each order."""
        staging, over = self.folder / "staging", threading.Event()
        staging.mkdir(exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "edge_fleet.rollout.switch",
            self.link,
            staging,
            self.reload,
        ]

        def look() -> None:
            while not over.wait(0.02):
                if (staging / "order.json").exists():
                    subprocess.run([str(word) for word in command], check=False)

        switch = threading.Thread(target=look)
        switch.start()
        try:
            yield staging
        finally:
            over.set()
            switch.join()

    def serves(self, name: str) -> bool:
        """Whether link and service are at a bundle, and the service answers."""
        wanted = fingerprint(read_manifest(self.root / name))
        found = self.service.wait_for(wanted, 30)
        return found and self.link.readlink() == Path(name) and bool(self.answerer.answer("a", 2))

    @property
    def current(self) -> str:
        return self.link.readlink().name

    @property
    def journal(self) -> journals.Journal:
        return Place(self.link).read()

    def bundles(self) -> set[str]:
        return {path.name for path in self.root.iterdir() if path.name[0] != "."} - {"r1"}


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, tiny_bundles: Bundles) -> Iterator[Device]:
    found = Device(tmp_path_factory.mktemp("device"), tiny_bundles("qwen2"))
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if found.service.look().fingerprint is not None:
                    break
            except BackendError:
                assert found.process.poll() is None, (found.folder / "serve.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        found.write_golden()
        yield found
    finally:
        found.close()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(trust.KEYS_VARIABLE, raising=False)
    monkeypatch.setattr(trust, "DEFAULT_KEYS", tmp_path / "no-keys")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    # A tiny model on a machine that does something else has no pace to speak of.
    monkeypatch.setattr(services, "MAX_SLOWDOWN", 1000.0)


def test_a_new_bundle_is_judged_switched_to_and_kept(device: Device):
    before = device.current
    done = roll_out(device.plan(device.offer()))
    assert done.changed
    assert done.bundle.name == device.current != before
    assert device.serves(done.bundle.name)
    assert device.journal.step == "done"
    assert device.bundles() == {"r1-first", before, device.current}
    # What was asked is kept as the measure of the next one, and nothing is done twice.
    assert device.journal.judged is not None
    assert device.journal.judged["bundle"] == device.current


def test_nothing_is_done_where_nothing_is_new_and_a_late_device_catches_up(device: Device):
    missed, newest = device.offer(), device.offer()
    assert missed != newest
    first = roll_out(device.plan(newest))
    again = roll_out(device.plan(newest))
    assert again == Outcome(first.digest, first.bundle, False)
    # Of the earlier ones of its own, the one before stays, to go back to.
    mine = {name for name in device.bundles() if name != "r1-first"}
    assert len(mine) <= 2
    assert device.current in mine


def test_a_bad_bundle_is_stopped_by_the_golden_set_before_anybody_sees_it(device: Device):
    before = device.current
    bad = device.offer(bad=True)
    hups = (device.folder / "serve.log").read_text().count("reloaded")
    with pytest.raises(GateError, match=r"golden set: .*answer_tokens") as caught:
        roll_out(device.plan(bad))
    assert caught.value.exit_code == 3
    assert device.serves(before)
    assert (device.folder / "serve.log").read_text().count("reloaded") == hups
    assert device.journal.new not in device.bundles()
    with pytest.raises(GateError, match="was rejected before"):
        roll_out(device.plan(bad))
    with pytest.raises(GateError, match="is rejected, and the old bundle serves"):
        roll_out(device.plan(bad, retry=True))


def test_the_text_is_read_before_anybody_is_asked(device: Device, monkeypatch: pytest.MonkeyPatch):
    before, reference = device.current, device.offer()
    real, asked = Candidate.read, []

    def read(who: Candidate, texts: Any, progress: Any) -> list[tuple[float, int]]:
        lost = 0.0 if who.service is not None else 0.1
        return [(nats + lost * tokens, tokens) for nats, tokens in real(who, texts, progress)]

    monkeypatch.setattr(Candidate, "read", read)
    monkeypatch.setattr(Candidate, "answer", lambda who, *_: asked.append(who))
    with pytest.raises(GateError, match=r"perplexity is 1\.1\d* times that of .*, at most 1\.08"):
        roll_out(device.plan(reference))
    assert not asked
    assert device.serves(before)


def test_the_first_bundle_that_was_accepted_stays_a_measure_until_somebody_says_otherwise(
    device: Device, monkeypatch: pytest.MonkeyPatch
):
    roll_out(device.plan(device.offer(), gate=None))
    first = device.current
    assert not device.journal.first
    for _ in range(2):
        roll_out(device.plan(device.offer()))
        assert device.journal.first is not None
        assert device.journal.first["bundle"] == first
    real = Candidate.read

    def read(who: Candidate, texts: Any, progress: Any) -> list[tuple[float, int]]:
        """As if each of the bundles before had lost 6 %."""
        return [(nats + 0.12 * tokens, tokens) for nats, tokens in real(who, texts, progress)]

    journal = device.journal
    assert journal.judged is not None
    journal.judged["nats"][0] += 0.06 * journal.judged["tokens"][0]
    with held(place := Place(device.link)):
        place.write(journal)
    with monkeypatch.context() as patch:
        patch.setattr(Candidate, "read", read)
        with pytest.raises(GateError, match=rf"perplexity is 1\.12\d* times that of {first}"):
            roll_out(device.plan(device.offer()))
    roll_out(device.plan(device.offer(), gate=None))
    assert not device.journal.first


def test_a_golden_set_without_right_answers_is_refused_and_nothing_is_rejected(
    device: Device, tmp_path: Path
):
    before, reference = device.current, device.offer()
    golden, text = tmp_path / "golden.jsonl", tmp_path / "text.txt"
    golden.write_text(json.dumps({"id": "1", "prompt": "1?", "answer": "never this"}) + "\n")
    text.write_text("The cat sat on the mat.")
    with pytest.raises(ConfigError, match=r"cannot reject anything: .* has 0 right answers of 1"):
        roll_out(device.plan(reference, gate=make_gate(golden)))
    assert device.serves(before)
    perplexity_alone = replace(make_gate(golden), golden=None)
    assert roll_out(device.plan(reference, gate=perplexity_alone)).changed


def test_where_memory_holds_one_bundle_the_trial_asks_and_goes_back(
    device: Device, monkeypatch: pytest.MonkeyPatch
):
    before = device.current
    monkeypatch.setattr(steps._Run, "_fits", lambda *_: False)
    with pytest.raises(GateError, match=r"golden set: .*answer_tokens"):
        roll_out(device.plan(device.offer(bad=True)))
    assert device.serves(before)
    done = roll_out(device.plan(device.offer()))
    assert any("judged on trial" in note for note in done.notes)
    assert device.serves(done.bundle.name)


def test_an_alarm_of_the_watch_takes_the_bundle_back(
    device: Device, monkeypatch: pytest.MonkeyPatch
):
    before = device.current
    reference = device.offer()
    monkeypatch.setattr(services, "_fault", lambda *_: "9 of 10 requests ended with an error")
    with pytest.raises(GateError, match="9 of 10 requests"):
        roll_out(device.plan(reference))
    assert device.serves(before)
    assert not device.journal.on_trial
    monkeypatch.undo()
    monkeypatch.setattr(services, "MAX_SLOWDOWN", 1000.0)
    assert roll_out(device.plan(reference, retry=True)).changed
    # It was kept then, so after another one it is as good as any.
    assert roll_out(device.plan(device.offer())).changed
    assert roll_out(device.plan(reference)).changed


def test_a_bundle_is_rejected_though_the_service_that_it_broke_cannot_be_reloaded(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """As systemctl refuses to reload a unit that has failed or waits to be started again."""
    before, reference = device.current, device.offer()
    monkeypatch.setattr(services, "_fault", lambda *_: "the service does not answer")
    script = f"{device.reload}; mkdir {tmp_path}/told"
    with pytest.raises(GateError, match="the service does not answer"):
        roll_out(device.plan(reference, reload=f"sh -c '{script}'"))
    assert device.serves(before)
    with pytest.raises(GateError, match="was rejected before"):
        roll_out(device.plan(reference))


@pytest.mark.parametrize("breaks", [False, True])
def test_a_take_back_that_the_service_did_not_hear_of_is_said_again(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, breaks: bool
):
    """As where systemd takes it for a part of the service's start."""
    before, reference = device.current, device.offer()
    monkeypatch.setattr(steps, "_RELOAD_AGAIN_S", 0.2)
    fault = BackendError("it was started again") if breaks else "the engine has failed"

    def watch(*_: object) -> str:
        if isinstance(fault, BackendError):
            raise fault
        return fault

    monkeypatch.setattr(services.Service, "watch", watch)
    # The second one, that of the take-back, fails and reaches nobody.
    script = f"echo >>{tmp_path}/n; [ $(wc -l <{tmp_path}/n) != 2 ] && {device.reload}"
    with pytest.raises(BackendError if breaks else GateError, match=str(fault)):
        roll_out(device.plan(reference, reload=f"sh -c '{script}'"))
    assert device.serves(before)


def test_a_service_that_opens_the_old_bundle_is_left_alone(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A command that restarts it would have it begin again and again."""
    before, reference = device.current, device.offer()
    monkeypatch.setattr(steps, "_RELOAD_AGAIN_S", 0.1)
    monkeypatch.setattr(services, "_fault", lambda *_: "the engine has failed")
    look, tries = services.Service.look, iter(range(10))

    def loading(self: services.Service) -> Any:
        told = (tmp_path / "n").read_text().count("\n") if (tmp_path / "n").exists() else 0
        if told == 2 and next(tries, None) is not None:
            raise services.LoadingError("it opens its bundles")
        return look(self)

    monkeypatch.setattr(services.Service, "look", loading)
    script = f"echo >>{tmp_path}/n; {device.reload}"
    with pytest.raises(GateError, match="the engine has failed"):
        roll_out(device.plan(reference, reload=f"sh -c '{script}'"))
    assert device.serves(before)
    assert (tmp_path / "n").read_text().count("\n") == 2


def test_a_device_that_polls_does_what_is_wanted_and_goes_back_at_once(
    device: Device, tmp_path: Path
):
    """The commands that the timer runs, with the real service."""
    key, keys, secret = make_key(), tmp_path / "trusted", tmp_path / "device-key"
    keys.write_text(key.public_text)
    keys.chmod(0o644)
    state = State(tmp_path / "state", tmp_path / "device-keys")
    secret.write_text(f"orin-a:{'k' * 20}\n")
    (tmp_path / "device-keys").write_text(secret.read_text())
    for path in (secret, tmp_path / "device-keys"):
        path.chmod(0o600)
    before, reference = device.current, parse_reference(device.offer(key=key))
    with Registry(reference) as registry:
        digest = look(reference, registry, None).digest
    fixed = f"{reference.registry}/{reference.repository}@{digest}"
    state.publish(seal(Wanted(3, fixed), key))
    config = uvicorn.Config(make_app(state), port=0, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        # fmt: off
        command = [
            "bundle", "rollout", "--wanted", f"http://127.0.0.1:{port}",
            "--device-key-file", secret,
            "--link", device.link, "--server", f"http://127.0.0.1:{device.port}",
            "--reload", device.reload, "--golden", device.golden, "--max-tokens", 12,
            "--text", device.golden.with_name("text.txt"), "--watch-s", 0.2, "--no-build",
            "--trusted-keys", keys, "--backend", "ort-cpu", "--kv-capacity", 128, "--json",
        ]
        # fmt: on
        # Other work on the machine slows an answer down, which is no reason to go back here.
        program = (
            "from edge_fleet.rollout import service; service.MAX_SLOWDOWN = 1000.0; "
            "from edge.cli import main; main()"
        )
        words = [sys.executable, "-c", program, *(str(word) for word in command)]

        def poll() -> dict[str, Any]:
            done = subprocess.run(words, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr.decode()
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer

        found = poll()
        assert (found["outcome"], found["running"]) == ("has", digest)
        new = device.current
        assert device.serves(new)
        assert new != before
        assert state.progress().done
        state.publish(seal(Wanted(4, fixed, "rollback"), key))
        assert poll()["outcome"] == "back"
        assert device.serves(before)
        assert new in device.bundles()
        assert poll()["outcome"] == "back"
        with pytest.raises(GateError, match=r"was rejected before, .*: it was rolled back"):
            roll_out(device.plan(str(reference)))
        with pytest.raises(ConfigError, match="no other version since it was last rolled back"):
            roll_back(device.link, device.reload)
    finally:
        server.should_exit = True
        thread.join()


def test_who_goes_back_during_a_trial_ends_the_trial(device: Device):
    before, reference = device.current, device.offer()
    kept = roll_out(device.plan(reference)).bundle.name
    place = Place(device.link)
    with held(place):  # as a power cut would leave it
        place.write(msgspec.structs.replace(place.read(), step="trial"))
    assert roll_back(device.link, device.reload) == before
    assert device.serves(before)
    assert kept != before
    with pytest.raises(GateError, match="it was rolled back"):
        roll_out(device.plan(reference))


def test_who_may_not_move_the_link_has_root_go_back(device: Device):
    before = device.current
    with device.staged() as staging:
        with pytest.raises(ConfigError, match="no other version"):
            roll_back(device.link, None, staging)
        roll_out(device.plan(device.offer(), staging=staging, reload=None))
        assert device.current != before
        assert roll_back(device.link, None, staging) == before
        assert device.serves(before)
        assert not device.journal.on_trial
        with pytest.raises(ConfigError, match="no other version"):
            roll_back(device.link, None, staging)
        # The next one is brought as ever.
        done = roll_out(device.plan(device.offer(), staging=staging, reload=None))
        assert device.serves(done.bundle.name)


def test_steps_that_fail_leave_the_old_bundle_and_reject_nothing(
    device: Device, monkeypatch: pytest.MonkeyPatch
):
    before = device.current
    reference = device.offer()
    for _ in range(MAX_TRIALS + 1):
        with pytest.raises(BackendError, match="fails with 1"):
            roll_out(device.plan(reference, reload="false"))
    assert device.serves(before)
    assert device.journal.rejected.keys().isdisjoint({device.journal.digest})
    plan = device.plan(reference, service=services.Service(device.answerer, "other"))
    with pytest.raises(ConfigError, match="has no model 'other'"):
        roll_out(plan)
    monkeypatch.setattr("edge_fleet.registry.client.time.sleep", lambda _: None)
    nowhere = replace(plan, reference=parse_reference("127.0.0.1:9/models/r1:v1"))
    with pytest.raises(RegistryError):
        roll_out(nowhere)
    assert device.serves(before)


def test_a_disk_that_fills_up_at_the_end_of_a_trial_takes_it_back(
    device: Device, monkeypatch: pytest.MonkeyPatch
):
    before, reference = device.current, device.offer()
    real = Place.write

    def full(place: Place, journal: journals.Journal) -> None:
        if journal.step == "done":
            raise ConfigError("cannot write the journal: No space left on device")
        real(place, journal)

    monkeypatch.setattr(Place, "write", full)
    with pytest.raises(ConfigError, match="No space left"):
        roll_out(device.plan(reference))
    assert not device.journal.on_trial
    assert device.serves(before)


def test_a_service_that_breaks_off_three_times_has_the_bundle_rejected(
    device: Device, monkeypatch: pytest.MonkeyPatch
):
    before, reference = device.current, device.offer()

    def broken(*_: object) -> None:
        raise BackendError("the service gave no answer")

    monkeypatch.setattr(steps._Run, "_watch", broken)
    for _ in range(MAX_TRIALS):
        with pytest.raises(BackendError, match="gave no answer"):
            roll_out(device.plan(reference))
    with pytest.raises(GateError, match="trials were cut off"):
        roll_out(device.plan(reference))
    assert device.serves(before)


def test_what_a_roll_out_of_another_bundle_never_ended_makes_room(
    device: Device, monkeypatch: pytest.MonkeyPatch
):
    missed, newest = device.offer(), device.offer()

    def fails(_: object) -> None:
        raise BuildError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(steps._Run, "_build", fails)
        with pytest.raises(BuildError):
            roll_out(device.plan(missed))
    whole, have = device.journal.new, device.bundles()
    assert whole in have
    halves = {f".r1-0123456789ab.edge-llm-{end}" for end in ("pull", "gone-012345")}
    for half in halves:
        (device.root / half).mkdir()
        (device.root / half / "decoder.onnx.data").write_bytes(b"1")
    found: list[set[str]] = []

    def pulling(*arguments: Any, **options: Any) -> Any:
        found.append({path.name for path in device.root.iterdir()})
        return pull(*arguments, **options)

    monkeypatch.setattr(steps, "pull", pulling)
    assert roll_out(device.plan(newest)).changed
    assert found[0] & {whole, *halves} == set()
    assert have - {whole} <= found[0]  # the one before the current, to go back to, too


@pytest.mark.parametrize("max_batch", [1, 4])
def test_the_new_engine_computes_as_many_sequences_at_once_as_the_old(
    device: Device, monkeypatch: pytest.MonkeyPatch, max_batch: int
):
    old = device.root / device.current
    write_engine(old, max_batch=max_batch, max_prefill=128)
    damaged = old / "engines/damaged/engine.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    run, built = subprocess.run, []

    def building(command: list[str], **options: Any) -> Any:
        if "build" not in command:
            return run(command, **options)
        built.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", building)
    assert roll_out(device.plan(device.offer(), build=True)).changed
    shutil.rmtree(old / "engines")
    [command] = built
    bundle = str(device.root / device.journal.new)
    assert command[3:] == ["build", bundle, *(["--max-batch", "4"] if max_batch == 4 else [])]


def test_a_device_that_serves_an_engine_is_not_moved_to_the_cpu(
    device: Device, monkeypatch: pytest.MonkeyPatch
):
    """As where the user of the roll-out may not open the GPU, or its Python has no TensorRT."""
    before, reference = device.current, device.offer()
    monkeypatch.setattr(Machine, "tensorrt", lambda _: Library(error="no GPU"))
    write_engine(device.root / before, max_prefill=128)
    with pytest.raises(DependencyError, match=r"TensorRT does not start \(no GPU\)"):
        roll_out(device.plan(reference, build=None))
    shutil.rmtree(device.root / before / "engines")
    assert device.serves(before)
    assert roll_out(device.plan(reference, build=None)).changed  # nothing was rejected


def test_an_engine_that_nobody_vouches_for_is_built_anew(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Nothing of it counts, and the build is told whom the roll-out trusts."""
    key, keys = make_key(), tmp_path / "trusted"
    keys.write_text(key.public_text)
    keys.chmod(0o644)
    engine = EngineConfig(backend="ort-cpu", num_slots=1, kv_capacity=128, trusted_keys=keys)
    write_engine(device.root / device.current, max_batch=8, max_prefill=128)
    run, built = subprocess.run, []

    def pulling(offer: Any, registry: Any, target: Path, **options: Any) -> Any:
        done = pull(offer, registry, target, **options)
        write_engine(target, max_prefill=128)
        built_here.clear()
        monkeypatch.setenv(RECORDS_VARIABLE, str(tmp_path / "no-records"))
        return done

    def building(command: list[str], **options: Any) -> Any:
        if "build" not in command:
            return run(command, **options)
        built.append((command[5:], options["env"][trust.KEYS_VARIABLE]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(steps, "pull", pulling)
    monkeypatch.setattr(subprocess, "run", building)
    old = device.current
    roll_out(device.plan(device.offer(key=key), engine=engine, build=True))
    shutil.rmtree(device.root / old / "engines")
    assert built == [([], str(keys))]


def test_an_unsigned_bundle_is_not_even_fetched(device: Device, tmp_path: Path):
    before, key = device.current, make_key()
    keys = tmp_path / "trusted"
    keys.write_text(key.public_text)
    engine = EngineConfig(backend="ort-cpu", num_slots=1, kv_capacity=128, trusted_keys=keys)
    have = device.bundles()
    with pytest.raises(BundleError, match="is not signed"):
        roll_out(device.plan(device.offer(), engine=engine))
    assert device.bundles() == have
    assert device.serves(before)
    # The old one is not signed either, so only the service may be asked what it answers.
    assert roll_out(device.plan(device.offer(key=key), engine=engine)).changed


class Releases:
    """A link of its own, which no service opens, and numbered bundles for it."""

    def __init__(self, device: Device, folder: Path) -> None:
        self.device, self.key, self.place = device, make_key(), Place(folder / "r1")
        keys = folder / "trusted"
        keys.write_text(self.key.public_text)
        self.engine = EngineConfig(
            backend="ort-cpu", num_slots=1, kv_capacity=128, trusted_keys=keys
        )

    def offer(
        self, number: int, expires: datetime | None = None, *, bad: bool = False, **changes: Any
    ) -> steps.Plan:
        now = datetime.now(timezone.utc)
        release = Release(number, now, expires) if number else None
        return self.device.plan(
            self.device.offer(bad=bad, key=self.key, release=release),
            **{
                "link": self.place.link,
                "service": None,
                "reload": None,
                "gate": None,
                "engine": self.engine,
                **changes,
            },
        )

    @property
    def here(self) -> tuple[str | None, set[str]]:
        found = self.place.link.parent.glob("r1-*")
        return self.place.current, {path.name for path in found}


@pytest.fixture
def releases(device: Device, tmp_path: Path) -> Releases:
    return Releases(device, tmp_path)


def test_an_older_release_of_the_same_key_is_not_taken(releases: Releases):
    """A moved tag leads to it, or to a bundle of before releases had numbers."""
    unnumbered, first, second = (releases.offer(number) for number in (0, 1, 2))
    assert roll_out(unnumbered).changed  # until a number was seen
    assert roll_out(second).changed
    here = releases.here
    for older in (first, unnumbered):
        with pytest.raises(BundleError, match=r"release 2 was here: somebody has moved the tag"):
            roll_out(older)
        assert releases.here == here
    assert releases.place.read().release == 2
    assert not roll_out(second).changed
    assert roll_out(releases.offer(2)).changed  # built again


def test_an_operator_goes_back_and_on_from_there(releases: Releases):
    unnumbered, first, second = (releases.offer(number) for number in (0, 1, 2))
    assert roll_out(second).changed
    assert roll_out(replace(first, allow_older=True)).changed
    assert releases.place.read().release == 1
    assert not roll_out(first).changed
    with pytest.raises(BundleError, match="no release with a number, and release 1 was here"):
        roll_out(unnumbered)
    assert roll_out(second).changed


def test_the_journal_knows_what_a_link_that_was_moved_by_hand_does_not(releases: Releases):
    first, second, third = (releases.offer(number) for number in (1, 2, 3))
    for plan in (first, third):
        assert roll_out(plan).changed
    _, bundles = releases.here
    releases.place.point(releases.place.read().old)
    assert not roll_out(first).changed  # whoever moved it is not told to move it again
    with pytest.raises(BundleError, match="release 3 was here"):
        roll_out(second)
    assert releases.here[1] == bundles
    (releases.place.folder / "journal.json").unlink()
    releases.place.point(roll_out(replace(third, allow_older=True)).bundle.name)
    (releases.place.folder / "journal.json").unlink()
    with pytest.raises(BundleError, match="release 3 was here"):  # by the bundle itself
        roll_out(second)


def test_with_a_staging_directory_the_journal_of_who_moves_the_link_counts(
    releases: Releases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An operator goes back as root, of which the other journal hears nothing."""
    staging = tmp_path / "staging"
    plan = releases.offer(4, staging=staging)
    own = Place(releases.place.link, staging)
    for place, number in ((own, 3), (releases.place, 5)):
        with place.locked():
            place.write(journals.Journal(release=number))
    with pytest.raises(BundleError, match="release 5 was here"):
        roll_out(plan)
    for place, number in ((own, 5), (releases.place, 3)):
        with held(place):
            place.write(journals.Journal(release=number))
    monkeypatch.setattr(steps._Run, "_check_size", _die)
    with pytest.raises(KeyboardInterrupt):  # it was taken so far
        roll_out(plan)


def test_a_release_that_was_rejected_does_not_count(device: Device, releases: Releases):
    gate = make_gate(device.golden)
    good = releases.offer(20, gate=gate)
    assert roll_out(good).changed
    with pytest.raises(GateError):
        roll_out(releases.offer(21, bad=True, gate=gate))
    assert releases.place.read().release == 20
    assert not roll_out(good).changed  # its vendor takes 21 back by moving the tag


def test_what_has_expired_is_not_taken_and_stays_where_it_is(
    releases: Releases, monkeypatch: pytest.MonkeyPatch
):
    """A tag that stands still, because somebody holds news back, shows once that is over."""
    now = datetime.now(timezone.utc)
    plan = releases.offer(30, now + timedelta(days=1))
    assert roll_out(plan).changed
    here = releases.here
    assert not roll_out(plan).changed

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return now + timedelta(days=2)

    monkeypatch.setattr("edge_fleet.registry.release.datetime", Later)
    for each in (plan, releases.offer(31, now + timedelta(days=1))):
        with pytest.raises(BundleError, match=r"release 3\d, which expired at"):
            roll_out(each)
        assert releases.here == here
    assert not roll_out(replace(plan, allow_older=True)).changed


def test_a_device_that_is_too_small_fetches_nothing(
    device: Device, monkeypatch: pytest.MonkeyPatch
):
    before, have = device.current, device.bundles()
    reference = device.offer()
    with monkeypatch.context() as patch:
        small = Snapshot(memory_total_bytes=100_000)
        patch.setattr("edge_lab.telemetry.read_snapshot", lambda: small)
        with pytest.raises(ResourceError, match=r"takes 0\.0 GB, and this device has"):
            roll_out(device.plan(reference))
    assert device.bundles() == have
    assert device.serves(before)


POINTS = (
    "after steps.look",
    "after steps.pull",
    "after steps._Run._note=pulled",
    "before steps._Run._judge_before",
    "after steps._Run._note=judged",
    "before steps._Run._try",
    "after steps._Run._note=trial",
    "after journal.Place.point",
    "after journal.Place.begin",
    "before service.Service.watch",
    "after service.Service.watch",
    "before steps._Run._keep",
)


@contextmanager
def held(place: Place) -> Iterator[None]:
    """Hold a place once the guard of a roll-out has let go of it, after its last word."""
    deadline = time.monotonic() + 60
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(place.locked())
                break
            except ConfigError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield


def test_kill_9_at_every_step_leaves_the_old_bundle_serving(device: Device):
    before = device.current
    reference = device.offer()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.edge_fleet.rollout.killed", *device.arguments(reference)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for point in POINTS:
            process.stdin.write(point + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "-9\n", point
            deadline = time.monotonic() + 60  # the guard may just be starting
            while device.journal.on_trial and time.monotonic() < deadline:
                time.sleep(0.02)
            assert device.serves(before), point
            with held(Place(device.link)):
                journal = device.journal
                journal.trials = 0
                Place(device.link).write(journal)
        process.stdin.write("after steps._Run._keep\n")  # it has been accepted by then
        process.stdin.flush()
        assert process.stdout.readline() == "-9\n"
    finally:
        process.communicate()
    assert device.journal.step == "done"
    assert device.serves(device.journal.new)
    with held(Place(device.link)):
        pass
    assert not roll_out(device.plan(reference)).changed


STAGED_POINTS = (
    "before journal.send=try",
    "after journal.send=try",
    "before service.Service.watch",
    "before journal.send=keep",
)


def test_who_may_not_move_the_link_has_root_do_it(device: Device):
    """The same roll-out with a staging directory: a good bundle, a bad one, and `kill -9`."""
    before, have = device.current, device.bundles()
    with device.staged() as staging:
        with pytest.raises(GateError, match=r"golden set: .*answer_tokens"):
            roll_out(device.plan(device.offer(bad=True), staging=staging, reload=None))
        assert device.current == before
        assert device.bundles() == have
        reference = device.offer()
        arguments = [*device.arguments(reference), str(staging)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.edge_fleet.rollout.killed", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        place = Place(device.link, staging)
        try:
            for point in STAGED_POINTS:
                process.stdin.write(point + "\n")
                process.stdin.flush()
                assert process.stdout.readline() == "-9\n", point
                deadline = time.monotonic() + 60  # the guard may just be starting
                while place.read().on_trial and time.monotonic() < deadline:
                    time.sleep(0.02)
                assert device.serves(before), point
                assert not device.journal.on_trial
                with held(place):
                    place.write(msgspec.structs.replace(place.read(), trials=0))
            process.stdin.write("after journal.send=keep\n")  # root has accepted it by then
            process.stdin.flush()
            assert process.stdout.readline() == "-9\n"
        finally:
            process.communicate()
        with held(place):
            pass
        assert device.serves(place.read().new)
        assert not roll_out(device.plan(reference, staging=staging, reload=None)).changed
        done = roll_out(device.plan(device.offer(), staging=staging, reload=None))
        assert device.serves(done.bundle.name)
        assert not list(staging.glob("r1-*"))


def test_who_is_ended_while_it_takes_a_trial_back_leaves_the_reload_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """systemd ends the guard of a roll-out that it has ended, wherever that is by then."""
    place, told = Place(tmp_path / "r1"), tmp_path / "told"
    place.link.symlink_to("r1-new")
    with place.locked():
        place.write(journals.Journal("sha256:1", "trial", "r1-new", "r1-old"))
    with monkeypatch.context() as patch:
        patch.setattr(journals, "reload_service", _die)
        with pytest.raises(KeyboardInterrupt):
            recover(place.link, "true")
    assert recover(place.link, f"mkdir {told}")
    assert told.exists()
    assert place.current == "r1-old"
    assert not recover(place.link, "false")


def test_a_trial_that_is_cut_off_again_and_again_is_not_tried_for_ever(device: Device):
    before = device.current
    reference = device.offer()
    plan = device.plan(reference)
    place = Place(device.link)
    for trial in range(1, MAX_TRIALS + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "guarded", lambda *_: _Nothing())
            patch.setattr(steps, "take_back", lambda *_, **__: False)
            patch.setattr(steps._Run, "_watch", _die)
            with pytest.raises(KeyboardInterrupt):
                roll_out(plan)
        assert device.journal.on_trial  # as a power cut would leave it
        assert device.current != before
        assert recover(device.link, device.reload)
        assert device.serves(before)
        assert device.journal.trials == trial or device.journal.rejected
        assert not recover(device.link, device.reload)
    with pytest.raises(GateError, match="trials were cut off before their end"):
        roll_out(plan)
    assert device.serves(before)
    with place.locked(), pytest.raises(ConfigError, match="another roll-out"):
        roll_out(plan)


class SlowService(services.Service):
    """Opens what the link names when it is told, for some looks, and serves the other meanwhile.

    Told meanwhile, it looks at the link again afterwards, as `edge-llm serve` does.
    """

    def __init__(self, link: Path) -> None:
        super().__init__(ServerAnswerer("http://127.0.0.1:9"), None)
        self.link = link
        self.serves = fingerprint(read_manifest(link))
        self.opens: list[str] = []
        self.told = False

    def reload(self, _: str | None) -> None:
        if self.opens:
            self.told = True
        else:
            self.opens = [fingerprint(read_manifest(self.link))] * 5

    def look(self) -> Sight:
        if self.opens:
            opened = self.opens.pop()
            if not self.opens:
                self.serves = opened
                if self.told:
                    self.told = False
                    self.reload(None)
        return replace(FIRST, fingerprint=self.serves)


@pytest.mark.parametrize("looks", [0, 3])
def test_a_trial_begins_again_only_once_the_service_has_gone_back(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, looks: int
):
    """Else it still serves the new bundle when that is asked for, and then turns to the old one.

    It may serve the old one for some looks, since it opens the new one only now.
    """
    shutil.copytree(device.bundle, tmp_path / "r1-first")
    link = tmp_path / "r1"
    link.symlink_to("r1-first")
    service = SlowService(link)
    old = service.serves
    monkeypatch.setattr(journals, "reload_service", service.reload)
    plan = device.plan(device.offer(), link=link, service=service, gate=None)
    kept = roll_out(plan)
    new = service.serves
    place = Place(link)
    with place.locked():  # as a power cut would leave it
        place.write(msgspec.structs.replace(place.read(), step="trial"))
    if looks:
        service.serves, service.opens = old, [new] * looks
        with pytest.raises(BackendError, match=f"turned to {old}"):
            roll_out(plan)
        assert service.serves == old
    assert roll_out(plan) == kept
    assert service.serves == new


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _die(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("server", [None, "http://127.0.0.1:9"])
def test_the_first_bundle_of_a_device_needs_no_service(
    device: Device, tmp_path: Path, server: str | None
):
    service = server and services.Service(ServerAnswerer(server), None)
    done = roll_out(device.plan(device.offer(), link=tmp_path / "r1", service=service))
    assert (tmp_path / "r1").resolve() == done.bundle
    (tmp_path / "own").mkdir()
    with pytest.raises(ConfigError, match="is no link"):
        roll_out(device.plan(device.offer(), link=tmp_path / "own"))


def test_the_first_bundle_of_a_second_model_is_linked(device: Device, tmp_path: Path):
    link = tmp_path / "r2"
    service = services.Service(device.answerer, "second")
    done = roll_out(device.plan(device.offer(), link=link, service=service))
    assert link.resolve() == done.bundle
    assert any("has no model 'second'" in n and f"name {link} in its" in n for n in done.notes)


def test_a_service_whose_settings_name_another_path_is_no_first_bundle(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """It would go on with what it has, and the roll-out would say that all is well."""
    link = tmp_path / "r1"
    plan = device.plan(device.offer(), link=link)
    with pytest.raises(ConfigError, match=f"settings do not name {link}") as caught:
        roll_out(plan)
    assert f"mv -T BUNDLE {link}-first && ln -s r1-first {link}" in str(caught.value)
    (tmp_path / "r1-first").mkdir()
    with pytest.raises(ConfigError, match=f"that bundle: ln -s r1-first {link}"):
        roll_out(plan)
    (tmp_path / "r1-first").rmdir()
    answered = {"models": {}, "requests": {}, "drift": {"params": {}}, "uptime_s": 1.0}
    monkeypatch.setattr(device.answerer, "stats", lambda: answered)
    with pytest.raises(BackendError, match="has not opened the bundle yet"):
        roll_out(replace(plan, service=services.Service(device.answerer, None)))
    assert {path.name for path in tmp_path.iterdir()} == {".r1.edge-llm-rollout"}


# ------------------------------------------------------------------------------- the watch

OLD = Sight("fp_old", False, 1000, 10, frozenset({"seed"}), 90.0)
FIRST = Sight("fp_new", False, 1000, 10, frozenset({"seed"}), 100.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"ended": 1100, "errors": 11}, None),
        ({"ended": 1100, "errors": 12}, None),  # two of a hundred may be chance
        ({"ended": 1100, "errors": 14}, "4 of 100 requests"),
        ({"ended": 1003, "errors": 13}, "3 of 3 requests"),
        ({"failed": True}, "the engine has failed"),
        ({"fingerprint": None}, "no more"),
        ({"drifting": frozenset({"seed", "temperature"})}, "drifts: temperature"),
    ],
)
def test_faults_that_the_watch_finds(changes: dict[str, Any], message: str | None):
    found = _fault(replace(FIRST, **changes), FIRST, OLD)
    assert (found is None) if message is None else (message in str(found))


def test_a_slow_bundle_is_late_and_a_hiccup_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(services, "MAX_SLOWDOWN", 1.5)
    assert _late([0.2] * 7, [0.1] * 8) is None  # too few to say
    assert "a token takes 200.0 ms, with the old bundle 100.0 ms" in str(_late([0.2] * 8, [0.1]))
    assert _late([0.1] * 5 + [9.0] * 3, [0.1] * 8) is None
    assert _late([0.149] * 8, [0.1] * 8) is None


@pytest.mark.parametrize(("queue_ms", "token_ms", "late"), [(9000, 10, False), (0, 20, True)])
def test_slow_decoding_counts_as_late_and_queueing_does_not(
    monkeypatch: pytest.MonkeyPatch, queue_ms: int, token_ms: int, late: bool
):
    monkeypatch.setattr(services, "MAX_SLOWDOWN", 1.5)
    monkeypatch.setattr(services, "POLL_S", 0.0)
    server = ServerAnswerer("http://127.0.0.1:9")
    choice = {"message": {"content": "a"}, "finish_reason": "length"}
    found = {"choices": [choice], "usage": {"completion_tokens": 32}}

    def answered(queue_ms: int, token_ms: int) -> Any:
        first = queue_ms + 50
        timing = f"queue;dur={queue_ms}, ttft;dur={first}, total;dur={first + 31 * token_ms}.0"
        return lambda *_: (found, timing)

    watched = services.Service(server, None)
    monkeypatch.setattr(watched, "look", lambda: FIRST)
    items = [GoldenItem(str(n), "question") for n in range(4)]
    monkeypatch.setattr(server, "_exchange", answered(0, 10))
    paces = watched.pace(items) + watched.pace(items)
    assert paces == pytest.approx([0.01] * 8)
    monkeypatch.setattr(server, "_exchange", answered(queue_ms, token_ms))
    # It may take long until there are answers enough, and what is late ends the watch.
    watch_s = 60.0 if late else 0.1
    fault = watched.watch("fp_new", OLD, paces, items, watch_s, lambda _: None)
    assert (fault is not None) == late


def test_a_service_says_how_fast_it_decodes(device: Device):
    began = time.monotonic()
    (pace,) = device.service.pace([GoldenItem("1", "question")])
    assert 0 < pace < time.monotonic() - began


def test_a_service_that_is_started_again_quickly_has_ended_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(services, "POLL_S", 0.01)
    watched = services.Service(ServerAnswerer("http://127.0.0.1:9"), None)
    sights = iter([FIRST, replace(FIRST, uptime_s=101.0), replace(FIRST, ended=0, uptime_s=2.0)])
    monkeypatch.setattr(watched, "look", lambda: next(sights))
    with pytest.raises(BackendError, match="was started again"):
        watched.watch("fp_new", OLD, [], [], 60.0, lambda _: None)


@pytest.mark.parametrize("looks", [0, 1])
def test_a_service_that_falls_silent_breaks_the_trial_off(
    monkeypatch: pytest.MonkeyPatch, looks: int
):
    """As `systemctl restart` has it: nobody knows whether the bundle did that."""
    monkeypatch.setattr(services, "POLL_S", 0.01)
    silent = services.Service(ServerAnswerer("http://127.0.0.1:9"), None)
    real, sights = silent.look, iter([FIRST] * looks)
    monkeypatch.setattr(silent, "look", lambda: next(sights, None) or real())
    with pytest.raises(BackendError, match="is the service running"):
        silent.watch("fp_new", OLD, [], [], 0.1, lambda _: None)


@pytest.mark.parametrize(
    ("statuses", "message"),
    [
        ([429], None),
        ([503, 429, 200], None),
        ([503], "answered 503: engine_stalled"),
        ([200] * 118 + [503] * 9, "answered 503: engine_stalled"),  # only at the end of the watch
        ([503, 429], "answered 503: engine_stalled"),
    ],
)
def test_a_full_queue_says_nothing_of_the_bundle_and_other_errors_are_silence(
    monkeypatch: pytest.MonkeyPatch, statuses: list[int], message: str | None
):
    """As where the engine hangs, and /stats goes on answering."""
    server = ServerAnswerer("http://127.0.0.1:9")
    watched = services.Service(server, None)
    clock, given = [1.0], itertools.cycle(statuses)
    choice = {"message": {"content": "a"}, "finish_reason": "length"}
    good = json.dumps({"choices": [choice], "usage": {"completion_tokens": 32}}).encode()

    def ask(request: Any, **_: Any) -> Any:
        if (status := next(given)) == 200:
            return _Response(good)
        raise HTTPError(request.full_url, status, "", Message(), io.BytesIO(b"engine_stalled"))

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(services, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(server, "_opener", SimpleNamespace(open=ask))
    monkeypatch.setattr(watched, "look", lambda: FIRST)
    with nullcontext() if message is None else pytest.raises(BackendError, match=message):
        fault = watched.watch(
            "fp_new", OLD, [0.1] * 8, [GoldenItem("1", "question")], 600.0, lambda _: None
        )
        assert fault is None


class _Response(io.BytesIO):
    headers: ClassVar = {"server-timing": ""}


def test_a_service_that_loads_again_for_long_was_started_again(monkeypatch: pytest.MonkeyPatch):
    """An 8B takes minutes, in which the service answers and has no bundle, or not this one yet."""
    counts = {"requests": {}, "drift": {"params": {}}, "uptime_s": 9.0}
    model = {"fingerprint": "fp_new", "failed": False}
    server = ServerAnswerer("http://127.0.0.1:9")
    monkeypatch.setattr(services, "POLL_S", 0.01)
    for loading in ({}, {"other": model}):
        answers = iter([{"r1": model, "other": model}, loading])
        monkeypatch.setattr(server, "stats", lambda: {**counts, "models": next(answers)})  # noqa: B023
        watched = services.Service(server, "r1")
        with pytest.raises(BackendError, match="was started again"):
            watched.watch("fp_new", OLD, [], [], 60.0, lambda _: None)
