"""Lets root's `switch` move the link for a roll-out that may not: by an order and its answer.

An order is ``order.json`` in the staging directory, until it is done. Its answer is ``answer.json``
in root's own directory beside the link, where only root writes.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Literal

import msgspec

from edge.bundle.update import replace_durably
from edge.errors import (
    BackendError,
    BundleError,
    ConfigError,
    DependencyError,
    EdgeError,
    ResourceError,
)
from edge.files import MALFORMED, read_file
from edge_make.target import beside

ORDER_NAME, ANSWER_NAME = "order.json", "answer.json"
MAX_BYTES = 1 << 14
_CLAIM_S = 60.0  # for systemd to start `switch`
_DONE_S = 3600.0  # a bundle of 40 GB is copied by a slow disk in less
_ERRORS: dict[int, type[EdgeError]] = {
    error.exit_code: error for error in (ConfigError, BundleError, DependencyError, ResourceError)
}
Do = Literal["try", "keep", "back", "undo"]


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """A task for root.

    Attributes:
        id: 32 hexadecimal digits, of this order alone.
        do: ``try`` takes a bundle over and lets the link lead to it; ``keep`` ends its trial well;
            ``back`` ends whatever is on trial, and has the service look at the link in any case;
            ``undo`` goes back from a bundle that was kept to the one before.
        bundle: name of the bundle's directory; empty for ``back`` and ``undo``.
    """

    id: str
    do: Do
    bundle: str = ""


class Answer(msgspec.Struct):
    """The result of the order with this id: ``code`` is an exit code, and 0 if it is done."""

    id: str = ""
    done: bool = False
    code: int = 0
    said: str = ""


def send(link: Path, staging: Path, do: Do, bundle: str = "") -> None:
    """Give an order, and wait until it is done.

    Raises:
        EdgeError: root refuses it or fails at it, with root's words and exit code.
        ConfigError: the order cannot be written.
        BackendError: nobody takes it.
    """
    order = Order(uuid.uuid4().hex, do, bundle)
    path = staging / ORDER_NAME
    try:
        replace_durably(path, lambda file: file.write(msgspec.json.encode(order)), mode=0o644)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    deadline, claimed = time.monotonic() + _CLAIM_S, False
    while True:
        answer = read_answer(link)
        if answer.id == order.id and answer.done:
            break
        if answer.id == order.id and not claimed:
            deadline, claimed = time.monotonic() + _DONE_S, True
        if time.monotonic() > deadline:
            path.unlink(missing_ok=True)
            what = "it was begun and does not end" if claimed else "it was not begun"
            raise BackendError(
                f"nobody takes the order {path} ({what}); look at systemctl status "
                f"'edge-llm-switch@{link.name}.*'"
            )
        time.sleep(0.05)
    if answer.code:
        raise _ERRORS.get(answer.code, BackendError)(answer.said)


def read_answer(link: Path) -> Answer:
    """Read the result of the last order.

    Raises:
        ConfigError: it cannot be read.
    """
    path = beside(link, "rollout") / ANSWER_NAME
    try:
        return msgspec.json.decode(read_file(path, MAX_BYTES), type=Answer)
    except FileNotFoundError:
        return Answer()
    except (OSError, *MALFORMED) as error:
        raise ConfigError(f"{path} cannot be read ({error}); remove it") from error
