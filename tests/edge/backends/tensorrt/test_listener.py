"""Who hears what TensorRT says."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge.backends.tensorrt.listener import Listener
from tests.standins.cuda import FakeGpu
from tests.standins.network import Severity
from tests.standins.tensorrt import make_module


def test_two_engines_that_open_at_once_do_not_hear_each_other(gpu: FakeGpu):
    trt, together = make_module(gpu), threading.Barrier(2, timeout=30)

    def open_one(error: str) -> Listener:
        with Listener(trt) as listener:
            together.wait()
            listener.logger.log(Severity.ERROR, error)
            together.wait()
        return listener

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(open_one, ["error of one\n", "error of two\n"])
    assert first.logger is second.logger
    assert list(first.errors) == ["error of one"]
    assert list(second.errors) == ["error of two"]


def test_a_thread_of_tensorrts_own_is_heard(gpu: FakeGpu):
    heard: list[tuple[str, str]] = []
    with Listener(make_module(gpu), lambda *message: heard.append(message)) as listener:
        said = (Severity.WARNING, "CUDA is old")
        worker = threading.Thread(target=listener.logger.log, args=said)
        worker.start()
        worker.join()
        listener.logger.log(Severity.VERBOSE, "a tactic")
    listener.logger.log(Severity.ERROR, "later")
    assert heard == [("warning", "CUDA is old")]
    assert (listener.said, list(listener.errors)) == ("CUDA is old", [])


def test_messages_without_a_listener_go_to_the_log(gpu: FakeGpu, caplog: pytest.LogCaptureFixture):
    logger = Listener(make_module(gpu)).logger
    logger.log(Severity.ERROR, "comes back as an exception")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    logger.log(Severity.WARNING, "another GPU")
    assert "another GPU" in caplog.text


def test_a_listener_within_another_hears_alone(gpu: FakeGpu):
    trt = make_module(gpu)
    outer, inner = Listener(trt), Listener(trt)
    with outer:
        with inner:
            inner.logger.log(Severity.ERROR, "inner")
        outer.logger.log(Severity.ERROR, "outer")
    assert (list(outer.errors), list(inner.errors)) == (["outer"], ["inner"])
