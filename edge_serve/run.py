"""Runs the service: listen, open the models, serve, drain, exit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.bundle.manifest import read_manifest
from edge.device.cgroup import read_room_bytes
from edge.device.memory import read_swap_bytes
from edge.engine_config import EngineConfig
from edge.errors import BundleError, ConfigError, EdgeError
from edge_lab.telemetry import Snapshot, read_snapshot
from edge_make.resident_memory import read_rss_bytes

from .api.responses.stored import StoredResponses
from .api.samples import check_decoding
from .app import create_app
from .http.connections import Connections, listen, possible_connections, raise_file_limit
from .http.errors import APIError
from .http.guard import check_host, limit_arrivals
from .http.memory import limit_arenas
from .http.messages import make_server
from .http.probes import Probes, Ready
from .http.threads import in_daemon, in_thread
from .inputs import read_inputs
from .models.limits import check_room
from .models.loader import Loader
from .models.registry import ModelRegistry
from .models.switch import Switcher
from .observe.metrics import Metrics
from .observe.notify import Notifier
from .settings import ServerSettings, is_loopback
from .stored.bounded import IN_MEMORY, BoundedStore, MemoryStore
from .stored.store import ResponseStore

if TYPE_CHECKING:
    from edge.runtime.llm import LLM

_log = logging.getLogger("edge_serve")
_BEAT_S = 0.25
_THERMAL_S = 5.0
_COOLER_CELSIUS = 5.0  # how far below the limit it must cool before requests are taken again
_CLOSE_S = 5.0
_EXTEND_S = 10  # how often systemd hears that loading or draining continues
FORCED_EXIT = 130
HUNG_EXIT = 70


def open_llm(config: EngineConfig) -> Callable[[Path], LLM]:
    """Make the function that opens a bundle with this configuration."""

    def open_one(bundle: Path) -> LLM:
        from edge.runtime.llm import LLM

        return LLM(bundle, config)

    return open_one


class Service:
    """One server process.

    Args:
        settings: the operator's settings.
        open_llm: function that opens a bundle.
        notifier: connection to systemd.
        reread: function that reads the settings again, on SIGHUP; None ignores the signal.
        telemetry: function that reads the device's state.

    Attributes:
        models: models that are served.
        metrics: counters of what is served.
        port: TCP port on which the service listens, once `run` has begun.
        probes: the listener of ``probe_port``, if there is one.
        is_clean: False if an engine did not stop; the process should then end at once.

    Raises:
        ConfigError, DependencyError: the settings or packages do not suffice for `read_inputs`,
            `Metrics`, `ResponseStore` or `check_decoding`.
    """

    def __init__(
        self,
        settings: ServerSettings,
        open_llm: Callable[[Path], LLM],
        *,
        notifier: Notifier | None = None,
        reread: Callable[[], ServerSettings] | None = None,
        telemetry: Callable[[], Snapshot] = read_snapshot,
    ) -> None:
        check_decoding()
        inputs = read_inputs(settings)
        self._settings = settings
        self._notifier = notifier or Notifier({})
        self._reread = reread
        self._reloading: asyncio.Task[None] | None = None
        self._reload_again = False
        self._loaded = asyncio.Event()
        self._telemetry = telemetry
        self.models = ModelRegistry(
            open_llm,
            default=settings.default_model,
            rules=inputs.rules,
            splits=inputs.splits,
            stall_s=settings.stall_s,
            trusted_keys=settings.trusted_keys,
        )
        self.metrics = Metrics(
            self.models.stats,
            telemetry=telemetry,
            engines=self.models.engines,
            drift=inputs.drift,
            vllm_names=settings.vllm_metrics,
        )
        self._loader = Loader(
            self.models, settings, lambda: telemetry().memory_room_bytes, self.metrics
        )
        self._switcher = Switcher(
            self.models, self._loader, drain_timeout_s=settings.drain_timeout_s
        )
        num_connections = possible_connections(settings.max_connections, len(settings.model))
        limits = replace(settings, max_connections=num_connections)
        connections = Connections(num_connections, settings.max_connections_per_address)
        self._keys = inputs.keys
        arrivals = limit_arrivals(settings)
        self._stored = StoredResponses(self.models, limits, self.metrics, _open_store(settings))
        app = create_app(
            self.models, limits, self.metrics, self._keys, arrivals, self._stored, self._loader
        )
        self._server = make_server(
            app, limits, connections, arrivals, self.metrics.observe_rejection
        )
        self._socket = listen(settings.host, settings.port)
        self._socket.on_lack = connections.close_idlest
        self.port: int = self._socket.getsockname()[1]
        self.probes: Probes | None = None
        if settings.probe_port is not None:
            try:
                listener = listen(settings.host, settings.probe_port, "--probe-port")
            except ConfigError:
                self._socket.close()
                raise
            check = partial(check_host, settings, self._keys)
            self.probes = Probes(listener, check, self._readiness())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stops = 0
        self._stopped = asyncio.Event()
        self._forced = asyncio.Event()
        self.is_clean = True
        self._exit_code = 0
        self._failed_looks: set[tuple[str, type[Exception]]] = set()

    def stop(self) -> None:
        """Drain, then exit; a second call exits at once. Any thread may call it."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._on_stop)

    async def run(self) -> int:
        """Serve until `stop`; return the exit code.

        Raises:
            EdgeError: a model could not be opened.
        """
        self._loop = asyncio.get_running_loop()
        if self.probes is not None:
            self.probes.start()
        with self._signals():
            serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
            watching = [asyncio.create_task(each) for each in (self._watch(), self._watch_heat())]
            for task in watching:
                task.add_done_callback(self._on_watch_end)
            try:
                if await self._load():
                    await self._stopped.wait()
                    await self._drain()
                else:
                    self.is_clean = False  # the bundle that is being opened
            finally:
                self._server.should_exit = True
                for task in watching:
                    task.cancel()
                self._server.force_exit = self._forced.is_set()
                await serving
                await self._stored.close()
                await self._close()
                if self.probes is not None:
                    self.probes.close()
        return FORCED_EXIT if self._forced.is_set() else self._exit_code

    # ------------------------------------------------------------------------------- phases

    async def _load(self) -> bool:
        """Open the models; return False if `stop` was called first.

        Raises:
            EdgeError: a model could not be opened.
        """
        _log.info("listening on %s port %d", self._settings.host, self.port)
        if self.probes is not None:
            _log.info("probes are answered on port %d", self.probes.port)
        self._notifier.send(status="loading")
        await in_thread(self._check_room)
        loading = in_daemon(lambda: self.models.load(self._settings.model, self._loader.later))
        stopped = asyncio.ensure_future(self._stopped.wait())
        waiting: set[asyncio.Future[Any]] = {loading, stopped}
        while not (loading.done() or stopped.done()):
            self._extend()
            await asyncio.wait(waiting, timeout=_EXTEND_S, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            _log.info("stopped while a model was being opened")
            return False
        stopped.cancel()
        await loading
        for model in self.models.models():
            self._loader.watch(model)
        self._publish()
        _log.info("ready: %s", ", ".join(self._settings.model))  # now probes say so, too
        self._notifier.send(ready=1, status="serving")
        self._loaded.set()
        self._resuming = asyncio.create_task(self._stored.resume())
        # systemd counts a reload during the start as part of it, and sends no signal.
        paths = self._settings.model.items()
        if any(self.models.entry(name).bundle != path.resolve() for name, path in paths):
            self._on_reload()
        return True

    def _extend(self) -> None:
        """Ask systemd for enough time until it is asked again, or until `_close` ends."""
        self._notifier.send(extend_timeout_usec=int(3e6 * _EXTEND_S))

    def _check_room(self) -> None:
        """Compare the memory that the control groups leave with what the bundles take.

        Raises:
            ResourceError: there is too little to open them.
        """
        room, swap = read_room_bytes(), read_swap_bytes()
        # The first bundle is opened whatever the room; others are checked one by one.
        first = dict(list(self._settings.model.items())[:1])
        if room is not None:
            hard = read_room_bytes(is_hard=True)
            with contextlib.suppress(BundleError):  # opening it says so
                check_room(
                    replace(self._settings, model=first),
                    room + swap,
                    read_rss_bytes() or 0,
                    None if hard is None else hard + swap,
                )

    async def _drain(self) -> None:
        self.models.is_draining = True
        self._loader.drain()
        self._publish()
        self._notifier.send(stopping=1, status="draining")
        running = self.models.num_flights
        _log.info("stopping; %d requests may take %g s", running, self._settings.drain_timeout_s)
        deadline = time.monotonic() + self._settings.drain_timeout_s
        extended = -float("inf")
        storing = asyncio.create_task(self._stored.suspend())
        while not storing.done() or (self.models.num_flights and time.monotonic() < deadline):
            now = time.monotonic()
            if now - extended >= _EXTEND_S:
                extended = now
                self._extend()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._forced.wait(), 0.02)
                break
        if storing.done() and (error := storing.exception()) is not None:
            _log.error("not all that ran in the background is suspended", exc_info=error)
        if self.models.num_flights:
            _log.warning("%d requests are cut short", self.models.num_flights)
            self.models.abort_all(
                APIError(503, "shutdown", "the server was shut down", retry_after_s=5, close=True)
            )
            await asyncio.sleep(0.1)  # sends their last events

    async def _close(self) -> None:
        """Close the models; an engine that hangs must not keep the process."""
        patience_s = 1.0 if self._forced.is_set() else _CLOSE_S
        if self._loader.lock.locked():  # a model is being opened or closed
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._loader.lock.acquire(), patience_s)
                self._loader.lock.release()
        if self._loader.lock.locked():
            _log.info("stopped while a model was being opened")
            self.is_clean = False
        closing = in_daemon(self.models.close)
        done, _ = await asyncio.wait({closing}, timeout=patience_s)
        if not done:
            _log.error("an engine did not stop within %g s", patience_s)
            self.is_clean = False
            self._exit_code = HUNG_EXIT

    # ------------------------------------------------------------------------------- watching

    async def _watch(self) -> None:
        """Watch the engines and feed systemd's watchdog, forever; wait for nothing else."""
        feed_s = None if self._notifier.watchdog_s is None else self._notifier.watchdog_s / 3
        fed = -float("inf")
        while True:
            with self._survived("a look at the engines"):
                self.models.beat()
                self._publish()
                now = time.monotonic()
                if feed_s is not None and now - fed >= feed_s and self.models.is_alive:
                    fed = now
                    self._notifier.send(watchdog=1)
            await asyncio.sleep(_BEAT_S)

    def _readiness(self) -> Ready:
        try:
            return self.models.readiness()
        except APIError as error:
            return error

    def _publish(self) -> None:
        if self.probes is not None:
            self.probes.publish(self._readiness())

    async def _watch_heat(self) -> None:
        """Read temperatures forever, one reading at a time; the last finished one counts."""
        while True:
            with self._survived("a look at the temperatures"):
                self._judge_heat(await in_thread(self._telemetry))
            await asyncio.sleep(_THERMAL_S)

    @contextlib.contextmanager
    def _survived(self, what: str) -> Iterator[None]:
        """Log each kind of error the first time, so that the loop around it continues."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - logged
            if (what, type(error)) not in self._failed_looks:
                self._failed_looks.add((what, type(error)))
                _log.exception("%s failed; others follow, and log no such error again", what)

    def _on_watch_end(self, task: asyncio.Task[None]) -> None:
        if self._server.should_exit:
            return
        error = None if task.cancelled() else task.exception()
        _log.critical("nobody watches the engines any more; stopping", exc_info=error)
        self._exit_code = HUNG_EXIT
        self._stopped.set()

    def _judge_heat(self, snapshot: Snapshot) -> None:
        limit = self._settings.hot_celsius
        hottest = max(snapshot.temperatures_celsius.values(), default=None)
        if hottest is None:
            self.models.trouble = None
        elif hottest >= limit and self.models.trouble is None:
            self.models.trouble = "thermal"
            _log.warning("not ready: a thermal zone has %.1f degrees Celsius", hottest)
        elif hottest < limit - _COOLER_CELSIUS and self.models.trouble is not None:
            self.models.trouble = None
            _log.info("ready again: the hottest thermal zone has %.1f degrees Celsius", hottest)

    # ------------------------------------------------------------------------------- reload

    async def reload(self) -> None:
        """Read keys and settings again and replace every model whose bundle has changed.

        An error is logged and ends the reload; models not yet replaced stay as they are.
        """
        if self._reread is None:
            return
        try:
            if self._keys is not None:
                await in_thread(self._keys.reread)
            fresh = self._reread()
            for name, path in fresh.model.items():
                bundle = path.resolve()
                if name not in self._settings.model:
                    raise ConfigError(f"the new model {name!r} needs a restart")
                served = self.models.entry(name)
                manifest = await in_thread(partial(read_manifest, bundle))
                if manifest != served.manifest or bundle != served.bundle:
                    await self._switcher.switch(name, bundle)
        except (EdgeError, APIError) as error:
            _log.error("nothing more was reloaded: %s", error)
            return
        except Exception:  # noqa: BLE001 - logged; nobody awaits this task
            _log.exception("nothing more was reloaded")
            return
        same = replace(fresh, model=self._settings.model)
        if same != self._settings:
            _log.warning("settings other than the bundles have changed; they need a restart")
        _log.info("reloaded")

    # ------------------------------------------------------------------------------- signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        # The command line holds the signals back until here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP, signal.SIGTERM})
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _on_reload(self) -> None:
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.create_task(self._reload_till_done())
        else:
            # Its cause may have changed after the running reload had looked.
            self._reload_again = True
            _log.info("a reload is under way; another one follows it")

    async def _reload_till_done(self) -> None:
        await self._loaded.wait()  # before that there is nothing to replace
        self._reload_again = True
        while self._reload_again:
            self._reload_again = False
            await self.reload()

    def _on_stop(self) -> None:
        self._stops += 1
        self._stopped.set()
        if self._stops > 1:
            self._forced.set()


def _open_store(settings: ServerSettings) -> BoundedStore | None:
    """Open the store of responses; None where other machines ask, and no directory is named.

    Clients of a trusted proxy have one key, and would see each other's.
    """
    if settings.responses_dir is not None:
        return ResponseStore(settings.responses_dir)
    if not is_loopback(settings.host) or settings.trusted_proxies:
        return None
    _log.info(
        "each client's last %d responses, or %d MB of them, are kept in memory; responses_dir names"
        " a directory that keeps them over restarts",
        IN_MEMORY.client_responses,
        (IN_MEMORY.client_bytes or 0) >> 20,
    )
    return MemoryStore()


def serve(
    settings: ServerSettings,
    open_one: Callable[[Path], LLM] | None = None,
    reread: Callable[[], ServerSettings] | None = None,
) -> int:
    """Run the service in this process until a signal; return the exit code.

    Args:
        settings: the operator's settings.
        open_one: function that opens a bundle; by default as the settings say.
        reread: function that reads the settings again, on SIGHUP.

    Raises:
        EdgeError: the service could not start.
    """
    limit_arenas()
    raise_file_limit()
    opens = open_one or open_llm(settings.engine)
    service = Service(settings, opens, notifier=Notifier(os.environ), reread=reread)
    code = asyncio.run(service.run())
    if not service.is_clean:
        logging.shutdown()
        os._exit(code)  # the threads of a hung engine would keep the process forever
    return code
