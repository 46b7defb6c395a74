from __future__ import annotations

import os

import pytest

from edge import confine
from edge.errors import ResourceError


def test_both_tables_name_every_call_once():
    for column in (0, 1):
        numbers = [pair[column] for pair in confine._ALLOWED.values()]
        assert len(numbers) == len(set(numbers))


def test_a_machine_of_another_kind_is_said(monkeypatch: pytest.MonkeyPatch):
    names = os.uname()
    other = os.uname_result((*names[:4], "riscv64"))
    monkeypatch.setattr(os, "uname", lambda: other)
    with pytest.raises(ResourceError, match=r"only Linux on x86_64 or aarch64 .* riscv64"):
        confine.confine()
