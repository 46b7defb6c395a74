"""Tells systemd the state of the service (sd_notify), by the datagram socket that it names.

The protocol is that of sd_notify(3): lines ``KEY=VALUE``. Without systemd nothing is sent.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

_log = logging.getLogger("edge_serve")


class Notifier:
    """A sender to ``$NOTIFY_SOCKET``; sends nothing if there is none.

    Args:
        environ: e.g. ``os.environ``.

    Attributes:
        watchdog_s: seconds without ``WATCHDOG=1`` after which systemd restarts the service; None
            without a watchdog.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        micros = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._lost: set[str] = set()
        self.watchdog_s = int(micros) / 1e6 if micros.isdecimal() and ours else None

    def send(self, **fields: str | int) -> None:
        """Send one message. A failure is logged, repeated ones only the first time."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        message = "\n".join(f"{name.upper()}={value}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.connect(address)
                sock.sendall(message.encode())
        except OSError as error:
            if not self._lost.issuperset(fields):
                self._lost.update(fields)
                _log.error(
                    "systemd was not told %s: %s (NOTIFY_SOCKET is %s); it may take the service "
                    "for hung and restart it",
                    message.replace("\n", ", "),
                    error.strerror or error,
                    self._address,
                )
        else:
            self._lost.difference_update(fields)
