from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest

from edge.errors import BackendError, BundleError, ConfigError, EdgeError, ResourceError
from edge_fleet.rollout import orders
from edge_fleet.rollout.journal import Place
from edge_fleet.rollout.orders import Answer, Order, read_answer, send
from tests.systemd_machine import until


@pytest.fixture
def link(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    Place(tmp_path / "r1").folder.mkdir()
    return tmp_path / "r1"


def answer(link: Path, **fields: object) -> Order:
    """Wait for an order and answer it, as root does."""
    path = link.parent / "staging/order.json"
    until(path.exists, 30)
    order = msgspec.json.decode(path.read_bytes(), type=Order)
    told = msgspec.structs.replace(Answer(order.id, True), **fields)
    (Place(link).folder / "answer.json").write_bytes(msgspec.json.encode(told))
    return order


@pytest.mark.parametrize(
    ("code", "kind"),
    [(64, ConfigError), (65, BundleError), (71, ResourceError), (70, BackendError)],
)
def test_roots_word_is_the_error(link: Path, code: int, kind: type[EdgeError]):
    root = threading.Thread(target=answer, args=(link,), kwargs={"code": code, "said": "so it is"})
    root.start()
    with pytest.raises(kind, match="so it is"):
        send(link, link.parent / "staging", "try", "r1-0123456789ab")
    root.join()


def test_the_answer_to_another_order_is_none(link: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(orders, "_CLAIM_S", 0.2)
    (Place(link).folder / "answer.json").write_bytes(msgspec.json.encode(Answer("0" * 32, True)))
    with pytest.raises(BackendError, match=r"nobody takes .*was not begun.*edge-llm-switch@r1"):
        send(link, link.parent / "staging", "back")
    assert not (link.parent / "staging/order.json").exists()  # or it would be done much later


def test_an_order_that_is_begun_and_never_ends_is_given_up(
    link: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(orders, "_DONE_S", 0.2)
    root = threading.Thread(target=answer, args=(link,), kwargs={"done": False})
    root.start()
    with pytest.raises(BackendError, match="was begun and does not end"):
        send(link, link.parent / "staging", "back")
    root.join()


def test_unwritable_and_unreadable_files_are_reported(link: Path):
    with pytest.raises(ConfigError, match="cannot write"):
        send(link, link.parent / "missing", "back")
    (Place(link).folder / "answer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"answer\.json cannot be read"):
        read_answer(link)
