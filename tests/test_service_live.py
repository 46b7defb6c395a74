"""The installed service under a real systemd: what the unit promises, seen to happen.

One boot serves all tests, so they stay together and in this order. The units are the installer's
with the drop-in ``cpu``; what differs is the time of the watchdog, 6 s instead of 30.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edge_make.key_file import hashed_line
from tests.conftest import Bundles
from tests.makers.manifests import replace_file
from tests.systemd_machine import ROOT, Machine, until, why_not

pytestmark = [pytest.mark.live, pytest.mark.slow, pytest.mark.xdist_group("systemd")]

UNIT, WATCH = "edge-llm@tiny.service", "edge-llm-watch@tiny.service"
ROLLOUT, TIMER = "edge-llm-rollout@tiny.service", "edge-llm-rollout@tiny.timer"
SWITCH = "edge-llm-switch@tiny.service"
STAGING = "/var/lib/edge-llm-rollout/tiny"
# What a bundle would try that takes over the process which judges it, and how each ended.
PROBE = """
import json, os, socket, subprocess
tries = {}
def attempt(name, do):
    try:
        tries[name] = f"done: {do()}"
    except Exception as error:
        tries[name] = type(error).__name__
for path in ("/run/dbus/system_bus_socket", "/run/systemd/private"):
    attempt(path, lambda: socket.socket(socket.AF_UNIX).connect(path))
run = lambda *command: subprocess.run(command, check=True, capture_output=True, timeout=9)
attempt("systemd-run", lambda: run("systemd-run", "--wait", "true"))
attempt("reload", lambda: run("systemctl", "reload", "edge-llm@tiny"))
for path in ("/var/lib/edge-llm/bundles", "/etc/edge-llm", "/opt/edge-llm"):
    attempt(path, lambda: open(f"{path}/of-the-probe", "w"))
attempt("link", lambda: os.replace("/var/lib/edge-llm/bundles/tiny", "/var/lib/edge-llm/bundles/x"))
attempt("keys", lambda: open("/etc/edge-llm/api-keys").read())
attempt("fork as root", lambda: os.setuid(0))
attempt("staging", lambda: open(f"{os.environ['STATE_DIRECTORY']}/of-the-probe", "w").close())
from edge_make.engine_record import check_recording
attempt("records of engines", check_recording)
attempt("root's records", lambda: open("/var/lib/edge-llm/engine-records/of-the-probe", "w"))
tries["uid"] = str(os.getuid())
with open(f"{os.environ['STATE_DIRECTORY']}/probe.json", "w") as file:
    json.dump(tries, file)
"""
REGISTRY = """version: 0.1
storage: {filesystem: {rootdirectory: /var/lib/registry}}
http: {addr: '127.0.0.1:5000'}
"""
CONNECT = """
import socket
socket.socket(socket.AF_UNIX).connect("/run/dbus/system_bus_socket")
print("connected")
"""
MODELS = "http://127.0.0.1:443/v1/models"
BUNDLE, KEYS = "/var/lib/edge-llm/bundles/tiny", "/etc/edge-llm/api-keys"
MAX_EXPOSURE = 1.5
BACK_S = 60.0  # a machine with other work takes a while to load Python and a model
ROOM = {"max_tokens": 100, "ignore_eos": True}


@pytest.fixture(scope="module")
def booted(tiny_bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    for needed in ("uvicorn", "starlette", "prometheus_client", "llguidance"):
        pytest.importorskip(needed)
    reason = why_not(tmp_path_factory.mktemp("probe"))
    if reason is not None:
        pytest.skip(reason)
    with Machine(tmp_path_factory.mktemp("machine"), tiny_bundles("qwen2")) as machine:
        yield machine


@pytest.fixture
def machine(booted: Machine) -> Machine:
    """The machine with the service up, whatever the test before has done to it."""
    booted.call("systemctl", "reset-failed", UNIT)  # the tests start it more often than it allows
    if booted.show(UNIT, "ActiveState")["ActiveState"] != "active":
        started = booted.call("systemctl", "start", UNIT)
        assert started.returncode == 0, started.stderr + booted.log(UNIT)
    return booted


def local_key(machine: Machine) -> str:
    found = re.search(r"^local:(\S+)$", machine.path(KEYS).read_text(), re.MULTILINE)
    assert found
    return found[1]


def complete(machine: Machine, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 3, **fields}
    status, answer = machine.request("/v1/completions", body, local_key(machine))
    assert status == 200, answer
    result: dict[str, Any] = json.loads(answer)
    return result


def main_pid(machine: Machine) -> int:
    return int(machine.show(UNIT, "MainPID")["MainPID"])


def is_ready(machine: Machine) -> bool:
    try:
        return machine.request("/ready", timeout=2)[0] == 200
    except OSError:
        return False


def test_a_start_ends_when_the_model_is_loaded(machine: Machine):
    """`Type=notify`: no wait, no second try."""
    assert machine.call("systemctl", "stop", UNIT).returncode == 0
    assert not is_ready(machine)
    assert machine.call("systemctl", "start", UNIT).returncode == 0
    assert is_ready(machine)
    assert machine.show(UNIT, "SubState", "StatusText") == {
        "SubState": "running",
        "StatusText": "serving",
    }


def test_the_service_is_nobody_and_may_nothing(machine: Machine):
    pid = main_pid(machine)
    status = machine.path(f"/proc/{pid}/status").read_text()
    fields = dict(re.findall(r"^(\w+):\s+(.*)$", status, re.MULTILINE))
    uids = {int(uid) for uid in fields["Uid"].split()}
    assert len(uids) == 1
    assert 61184 <= uids.pop() <= 65519  # systemd's range of dynamic users
    assert {int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"  # a filter
    # Where it is, not even root could write.
    inside = ("nsenter", f"--target={pid}", "--mount", "--wd=/", "touch")
    for place in ("/etc", "/usr", "/opt/edge-llm", "/var/lib/edge-llm", BUNDLE, "/sys"):
        assert "Read-only" in machine.call(*inside, f"{place}/x").stderr, place
    assert machine.call(*inside, "/var/cache/edge-llm/tiny/x").returncode == 0
    assert list(Path(f"/proc/{machine.pid}/root/proc/{pid}/root/root").iterdir()) == []


def test_systemd_counts_it_as_hardly_exposed(machine: Machine):
    for unit in (UNIT, WATCH, ROLLOUT, SWITCH):
        text = machine.ask("systemd-analyze", "security", "--no-pager", unit)
        found = re.search(r"Overall exposure level for \S+: ([\d.]+)", text)
        assert found, text
        assert float(found[1]) <= MAX_EXPOSURE


def test_the_installer_sets_limits_that_fit_the_bundle(machine: Machine):
    """The installer itself, in the machine, a second time: it also enables and restarts."""
    installer = ("/opt/checkout/scripts/install-service", "tiny", "--no-venv", "--with", "cpu")
    installed = machine.call("bash", *installer)
    assert installed.returncode == 0, installed.stderr
    assert "40-limits.conf" in installed.stdout
    assert is_ready(machine)
    shown = machine.show(UNIT, "MemoryHigh", "MemoryMax", "TasksMax", "TasksCurrent", "MainPID")
    high, most = int(shown["MemoryHigh"]), int(shown["MemoryMax"])
    assert 1 << 30 < high < most < 8 << 30
    status = machine.path(f"/proc/{shown['MainPID']}/status").read_text()
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident
    assert int(resident[1]) << 10 < high / 2
    threads = re.search(r"Threads:\s+(\d+)", status)
    assert threads
    assert int(threads[1]) < int(shown["TasksMax"]) / 2
    again = machine.call("bash", *installer)
    assert "wrote" not in again.stdout
    assert machine.ask("systemctl", "is-enabled", UNIT) == "enabled"


def test_its_keys_are_credentials(machine: Machine):
    assert machine.request("/v1/models")[0] == 401
    assert machine.request("/v1/models", key="not-one-of-them")[0] == 401
    assert machine.request("/v1/models", key=local_key(machine))[0] == 200
    assert machine.path(KEYS).stat().st_mode & 0o777 == 0o600
    link = machine.ask("readlink", "/run/edge-llm-tiny/api-keys")
    assert link == f"/run/credentials/{UNIT}/api-keys"


def test_what_runs_in_a_limited_child_runs_under_the_filter(machine: Machine):
    """A grammar, and a chat template that is not known."""
    good = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    bomb = {"type": "integer", "multipleOf": 999_983}  # compiles for minutes
    for schema, wanted in ((good, 200), (bomb, 400)):
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hello world"}],
            "max_tokens": 40,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "one", "strict": True, "schema": schema},
            },
        }
        status, answer = machine.request("/v1/chat/completions", body, local_key(machine))
        assert status == wanted, answer
        assert (b"simplify it" in answer) == (wanted == 400)
    assert "limits on time and memory only" not in machine.log(UNIT)  # they are confined, too
    assert is_ready(machine)


def test_a_reload_reads_the_keys_again(machine: Machine):
    pid, old = main_pid(machine), local_key(machine)
    text = machine.path(KEYS).read_text()
    machine.path(KEYS).write_text(hashed_line("new", "sk-a-new-key-of-the-tests") + "\n")
    try:
        assert machine.request("/v1/models", key=old)[0] == 200
        reloaded = machine.call("systemctl", "reload", UNIT)
        assert reloaded.returncode == 0, reloaded.stderr
        until(lambda: machine.request("/v1/models", key=old)[0] == 401, BACK_S)
        assert machine.request("/v1/models", key="sk-a-new-key-of-the-tests")[0] == 200
        owner, mode = machine.ask("stat", "--format=%u %a", "/run/edge-llm-tiny/api-keys").split()
        assert int(owner) >= 61184
        assert mode == "400"
        machine.path(KEYS).write_text("garbage without colon\n")
        assert machine.call("systemctl", "reload", UNIT).returncode == 0
        errors = ("journalctl", "--unit", UNIT, "--priority=err", "--output=cat", "--no-pager")
        until(lambda: "has a blank or a control character" in machine.ask(*errors), BACK_S)
        refused = machine.ask(*errors).splitlines()[-1]
        assert json.loads(refused)["level"] == "error"
        assert machine.request("/v1/models", key="sk-a-new-key-of-the-tests")[0] == 200
        machine.path(KEYS).rename(machine.path(f"{KEYS}.away"))
        assert machine.call("systemctl", "reload", UNIT).returncode != 0
        machine.path(f"{KEYS}.away").unlink()
        assert machine.request("/v1/models", key="sk-a-new-key-of-the-tests")[0] == 200
    finally:
        machine.path(KEYS).write_text(text)
    assert machine.call("systemctl", "reload", UNIT).returncode == 0
    until(lambda: machine.request("/v1/models", key=old)[0] == 200, BACK_S)
    assert main_pid(machine) == pid  # nothing was restarted


def test_a_new_bundle_is_taken_at_a_reload_if_it_is_good(machine: Machine):
    """The way of unattended updates: a link that is moved. Also with `kill -9` in between."""

    def move_link(target: str) -> None:
        assert machine.call("ln", "-sfn", target, f"{BUNDLE}.next").returncode == 0
        assert machine.call("mv", "-fT", f"{BUNDLE}.next", BUNDLE).returncode == 0
        assert machine.call("systemctl", "reload", UNIT).returncode == 0

    def answers(pattern: str) -> bool:
        return re.search(pattern, machine.log(UNIT)[said:]) is not None and is_ready(machine)

    bundles, pid = machine.path(BUNDLE).parent, main_pid(machine)
    machine.path(BUNDLE).rename(bundles / "tiny-1")
    for name in ("tiny-2", "tiny-bad"):
        assert machine.call("cp", "-r", f"{BUNDLE}-1", f"{BUNDLE[:-4]}{name}").returncode == 0
    (bundles / "tiny-bad" / "embeddings.safetensors").write_bytes(b"damaged")
    for target, pattern in (
        ("tiny-1", "model tiny is another bundle"),
        ("tiny-2", "model tiny is another bundle"),
        ("tiny-bad", "model tiny stays as it is"),
    ):
        said = len(machine.log(UNIT))
        move_link(target)
        until(lambda: answers(pattern), BACK_S)  # noqa: B023
        assert complete(machine)["usage"]["completion_tokens"] >= 1
    assert main_pid(machine) == pid
    move_link("tiny-1")
    machine.call("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)
    until(lambda: main_pid(machine) not in (0, pid) and is_ready(machine), BACK_S)
    assert complete(machine)["usage"]["completion_tokens"] >= 1


def test_the_watch_records_and_compares(machine: Machine):
    golden = [{"id": f"q{at}", "prompt": f"Say {at}."} for at in range(4)]
    lines = "".join(json.dumps(item) + "\n" for item in golden)
    machine.path("/etc/edge-llm/golden.jsonl").write_text(lines)
    machine.path("/etc/edge-llm/tiny.watch").write_text(
        "EDGE_LLM_WATCH_ARGS=--server http://127.0.0.1:8000 --golden /etc/edge-llm/golden.jsonl"
        " --max-tokens 8 --text-tokens 64\n"
    )
    for wanted in ("recorded 4 answers", "wrong_rate"):
        started = machine.call("systemctl", "start", WATCH)
        assert started.returncode == 0, machine.log(WATCH)
        assert wanted in machine.log(WATCH)
    assert machine.call("systemctl", "start", "edge-llm-watch@tiny.timer").returncode == 0
    timer = machine.show("edge-llm-watch@tiny.timer", "ActiveState", "NextElapseUSecRealtime")
    assert timer["ActiveState"] == "active"
    assert " 03:" in timer["NextElapseUSecRealtime"]  # of the night, and up to half an hour later


def test_the_timer_rolls_out_what_the_registry_has_and_a_kill_leaves_the_old(machine: Machine):
    """A real registry in the machine; the timer differs in its times, the watch is cut short."""
    if shutil.which("docker-registry") is None:
        pytest.skip("needs Debian's package docker-registry")
    bundles = machine.path(BUNDLE).parent
    if not machine.path(BUNDLE).is_symlink():
        machine.path(BUNDLE).rename(bundles / "tiny-1")
        machine.path(BUNDLE).symlink_to("tiny-1")
    machine.path("/etc/registry.yml").write_text(REGISTRY)
    serving = ("--unit=registry", "docker-registry", "serve", "/etc/registry.yml")
    assert machine.call("systemd-run", *serving).returncode == 0
    until(lambda: "200" in machine.ask("curl", "-sI", "http://127.0.0.1:5000/v2/"), BACK_S)
    settings = machine.path("/etc/edge-llm/tiny.rollout")
    timer_drop_in = machine.path(f"/etc/systemd/system/{TIMER.replace('tiny', '')}.d/99-test.conf")
    timer_drop_in.parent.mkdir(exist_ok=True)
    machine.path("/usr/local/probe.py").write_text(PROBE)
    drop_in = machine.path("/etc/systemd/system/edge-llm-rollout@.service.d/98-test.conf")
    drop_in.write_text("[Service]\nExecStartPre=/opt/edge-llm/bin/python /usr/local/probe.py\n")
    # By default systemd may put it off for a minute.
    timer_drop_in.write_text("[Timer]\nOnActiveSec=1s\nAccuracySec=1ms\nRandomizedDelaySec=0\n")
    assert machine.call("systemctl", "daemon-reload").returncode == 0

    def roll_out(version: str, watch_s: int) -> None:
        """Push a bundle that differs, and let the timer find it."""
        new = bundles / f"made-{version}"
        shutil.copytree(bundles / "tiny-1", new)
        config = json.dumps({"version": version}).encode()
        replace_file(new, "generation_config.json", config)
        reference = "127.0.0.1:5000/models/tiny:stable"
        push = ("/opt/edge-llm/bin/edge-llm", "bundle", "push", f"{BUNDLE[:-4]}{new.name}")
        pushed = machine.call(*push, reference)
        assert pushed.returncode == 0, pushed.stderr
        settings.write_text(
            f"EDGE_LLM_ROLLOUT={reference}\n"
            "EDGE_LLM_ROLLOUT_ARGS=--server http://127.0.0.1:8000 --no-build --gate none "
            f"--watch-s {watch_s} --switch-timeout-s 30\n"
        )
        assert machine.call("systemctl", "restart", TIMER).returncode == 0

    first = machine.path(BUNDLE).readlink()
    bus = machine.path("/run/dbus/system_bus_socket")
    bus.parent.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:  # there is one, and anybody may talk to it
        listener.bind(str(bus))
        bus.chmod(0o666)
        listener.listen()
        assert "connected" in machine.ask("setpriv", "--reuid=1", "python3", "-c", CONNECT)
        roll_out("good", watch_s=0)
        until(lambda: machine.path(f"{STAGING}/probe.json").exists(), BACK_S)
    bus.unlink()
    tried = json.loads(machine.path(f"{STAGING}/probe.json").read_text())
    assert tried.pop("staging") == "done: None"
    assert tried.pop("records of engines") == "done: None"
    assert tried["root's records"] == "OSError"
    assert 0 < int(tried.pop("uid")) < 61184
    assert {name: end for name, end in tried.items() if end.startswith("done")} == {}
    assert tried["/run/dbus/system_bus_socket"] == "FileNotFoundError"
    until(lambda: machine.path(BUNDLE).readlink() != first, 2 * BACK_S)
    until(lambda: machine.show(ROLLOUT, "ActiveState")["ActiveState"] == "inactive", BACK_S)
    assert machine.show(ROLLOUT, "Result")["Result"] == "success", machine.log(ROLLOUT)
    good = machine.path(BUNDLE).readlink()
    # What is served is root's copy, of which nothing is left to who judged it.
    files = list(machine.path(f"{BUNDLE}/").rglob("*"))
    assert {(path.stat().st_uid, path.stat().st_nlink) for path in files if path.is_file()} == {
        (0, 1)
    }
    assert not list(machine.path(STAGING).glob("tiny-*"))
    assert complete(machine)["usage"]["completion_tokens"] >= 1
    roll_out("cut", watch_s=600)
    until(lambda: machine.path(BUNDLE).readlink() != good, 2 * BACK_S)
    machine.call("systemctl", "stop", TIMER)
    machine.call("systemctl", "kill", "--kill-whom=main", "--signal=KILL", ROLLOUT)
    until(lambda: machine.show(ROLLOUT, "ActiveState")["ActiveState"] == "failed", BACK_S)
    assert machine.path(BUNDLE).readlink() == good, machine.log(ROLLOUT)
    assert complete(machine)["usage"]["completion_tokens"] >= 1


def test_a_killed_service_comes_back(machine: Machine):
    pid, restarts = main_pid(machine), int(machine.show(UNIT, "NRestarts")["NRestarts"])
    machine.call("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)
    until(lambda: main_pid(machine) not in (0, pid) and is_ready(machine), BACK_S)
    assert int(machine.show(UNIT, "NRestarts")["NRestarts"]) == restarts + 1
    assert complete(machine)["usage"]["completion_tokens"] >= 1


def test_a_hung_service_is_ended_and_comes_back(machine: Machine):
    pid = main_pid(machine)
    machine.call("systemctl", "kill", "--kill-whom=main", f"--signal={signal.SIGSTOP.value}", UNIT)
    until(lambda: main_pid(machine) not in (0, pid) and is_ready(machine), BACK_S)
    assert f"{UNIT}: Watchdog timeout (limit 6s)!" in machine.log(UNIT)
    assert complete(machine)["usage"]["completion_tokens"] >= 1


def test_a_stop_lets_running_answers_finish(machine: Machine):
    answers: list[Any] = []
    key, body = local_key(machine), {"model": "tiny", "prompt": "a", "n": 16, **ROOM}
    listens = threading.Event()
    listens.set()

    def ask() -> None:
        """Ask until nobody takes a request, so that the stop comes upon some that run."""
        while listens.is_set():
            try:
                status, answer = machine.request("/v1/completions", body, key)
            except ConnectionError:  # the last to end asks a service that is gone
                listens.clear()
                continue
            if status == 503:
                listens.clear()
            else:
                assert status == 200, answer
                answers.append(json.loads(answer))

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask) for _ in range(4)]
        until(lambda: len(answers) >= 4, 30)
        before = len(answers)
        stopped = machine.call("systemctl", "stop", UNIT)
        assert stopped.returncode == 0, stopped.stderr
        for client in clients:
            client.result(60)
    log = machine.log(UNIT)
    for answer in answers:
        assert answer["usage"]["completion_tokens"] == 16 * 100
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    running = re.findall(r"stopping; (\d+) requests may take", log)
    assert int(running[-1]) >= 1, "nothing was running any more"
    assert "are cut short" not in log
    assert len(answers) > before
    assert machine.show(UNIT, "ActiveState", "Result") == {
        "ActiveState": "inactive",
        "Result": "success",
    }


def test_what_runs_in_the_background_goes_on_after_a_restart(machine: Machine):
    """In the unit's own directory, which the sandbox lets it write."""
    settings, key = machine.path("/etc/edge-llm/tiny.toml"), local_key(machine)
    before = settings.read_text()
    settings.write_text(f'responses_dir = "/var/lib/edge-llm-responses/tiny"\n{before}')
    assert machine.call("systemctl", "restart", UNIT).returncode == 0
    body = {"model": "tiny", "input": "a", "background": True, "max_output_tokens": 100}
    ids: list[str] = []
    runs, restarted = threading.Event(), threading.Event()

    def ask() -> None:
        """Ask until the restart is over, so that it comes upon some that run.

        Several ask at once, since the tiny model answers sooner than one of them asks again.
        """
        while not restarted.is_set():
            try:
                status, answer = machine.request("/v1/responses", body, key)
            except (OSError, http.client.HTTPException):
                continue  # nobody listens in between
            if status == 200:
                ids.append(json.loads(answer)["id"])
                if len(ids) >= 16:
                    runs.set()

    askers = [threading.Thread(target=ask) for _ in range(8)]
    for asker in askers:
        asker.start()
    try:
        assert runs.wait(60)
        assert machine.call("systemctl", "restart", UNIT).returncode == 0
    finally:
        restarted.set()
        for asker in askers:
            asker.join()
    assert re.search(r"is suspended after \d+ tokens", machine.log(UNIT)), "all had ended"

    def responses() -> list[dict[str, Any]]:
        answers = [machine.request(f"/v1/responses/{id_}", key=key) for id_ in ids]
        assert {status for status, _ in answers} == {200}
        return [json.loads(answer) for _, answer in answers]

    until(lambda: not {"queued", "in_progress"} & {each["status"] for each in responses()}, 60)
    for each in responses():
        assert each["status"] in ("completed", "incomplete"), each["error"]
        assert each["usage"]["output_tokens"] == 100 or each["status"] == "completed"
    directory = machine.path("/var/lib/private/edge-llm-responses/tiny").stat()
    assert directory.st_mode & 0o777 == 0o700
    assert directory.st_uid != 0
    settings.write_text(before)
    assert machine.call("systemctl", "restart", UNIT).returncode == 0


def test_the_endpoint_of_a_fleet_starts_reloads_and_ends_as_a_unit(machine: Machine):
    """With the right of nobody else, in its sandbox, and its access lines in the journal."""
    if shutil.which("haproxy", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("needs HAProxy (Debian: haproxy)")
    unit, home = "edge-llm-fleet.service", machine.path("/etc/edge-llm-fleet")
    added = machine.call(
        "useradd", "--system", "--home-dir", "/etc/edge-llm-fleet", "edge-llm-fleet"
    )
    assert added.returncode == 0, added.stderr
    shutil.copy(ROOT / "scripts/systemd" / unit, machine.path("/etc/systemd/system"))
    library = machine.path("/etc/systemd/system/edge-llm-rollout@.service.d/99-test.conf")
    drop_in = machine.path(f"/etc/systemd/system/{unit}.d/99-test.conf")
    drop_in.parent.mkdir()
    shutil.copy(library, drop_in)
    home.mkdir(mode=0o700)
    (home / "device.key").write_text(f"endpoint:{local_key(machine)}\n")
    (home / "clients.keys").write_text("ann:key-of-ann-0123456789\n")
    (home / "fleet.toml").write_text(
        'port = 443\napi_key_file = "clients.keys"\n[devices.tiny]\n'
        'url = "http://127.0.0.1:8000"\nkey_file = "device.key"\n'
    )
    for file in home.iterdir():
        file.chmod(0o600)
    assert machine.call("chown", "-R", "edge-llm-fleet", "/etc/edge-llm-fleet").returncode == 0
    assert machine.call("systemctl", "daemon-reload").returncode == 0
    started = machine.call("systemctl", "start", unit)
    assert started.returncode == 0, machine.log(unit)

    def models(key: str) -> str:
        asked = ["curl", "-sS", "-m", "10", "-H", f"Authorization: Bearer {key}"]
        return machine.ask(*asked, "-w", "%{http_code}", "-o", "/dev/null", MODELS)

    until(lambda: models("key-of-ann-0123456789") == "200", BACK_S)
    (home / "clients.keys").write_text("bob:key-of-bob-0123456789\n")
    reloaded = machine.call("systemctl", "reload", unit)
    assert reloaded.returncode == 0, machine.log(unit)
    until(lambda: models("key-of-ann-0123456789") == "401", BACK_S)
    assert models("key-of-bob-0123456789") == "200"
    assert '"client": "ann", "device": "tiny"' in machine.log(unit)
    assert machine.call("systemctl", "stop", unit).returncode == 0
    state = machine.show(unit, "ActiveState", "NRestarts")
    assert state == {"ActiveState": "inactive", "NRestarts": "0"}
    machine.path(f"/etc/systemd/system/{unit}").unlink()  # no installer put it there


def test_a_damaged_bundle_is_said_once(machine: Machine):
    assert machine.call("systemctl", "stop", UNIT).returncode == 0
    weights = machine.path(f"{BUNDLE}/embeddings.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert machine.call("systemctl", "start", UNIT).returncode != 0
        state = machine.show(UNIT, "ActiveState", "ExecMainStatus", "NRestarts")
        assert state["ActiveState"] == "failed"
        assert state["ExecMainStatus"] == "65"
        assert state["NRestarts"] == "0"  # no storm
        last = machine.log(UNIT).splitlines()[-8:]
        assert any("error: " in line and "embeddings.safetensors" in line for line in last), last
    finally:
        weights.write_bytes(whole)
    assert machine.call("systemctl", "start", UNIT).returncode == 0
    assert is_ready(machine)


def test_uninstall_takes_all_but_configuration_and_bundles(machine: Machine):
    done = machine.call("bash", "/opt/checkout/scripts/install-service", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert not is_ready(machine)
    assert machine.show(UNIT, "LoadState")["LoadState"] == "not-found"
    found = machine.ask("find", "/etc/systemd/system", "-path", "*edge-llm*", "-not", "-type", "d")
    left = [path for path in found.splitlines() if "test" not in path]
    assert left == []
    assert machine.path(KEYS).exists()
    assert machine.path("/etc/edge-llm/tiny.toml").exists()
    assert machine.path(f"{BUNDLE}/manifest.json").exists()
