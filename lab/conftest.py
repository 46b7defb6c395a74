"""Gives the experiments' tests the fixtures and the rules of the product's tests."""

from __future__ import annotations

import pytest

from tests import conftest
from tests.conftest import *  # noqa: F403  fixtures and hooks
from tests.conftest import _no_network, _restored_logger, _restored_signals  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:  # type: ignore[no-redef]
    """Configure what that conftest.py does, unless its own folder is tested, too."""
    if not config.pluginmanager.is_registered(conftest):
        conftest.pytest_configure(config)
