"""A browser for the page; skipped where Debian's chromium and chromium-driver are missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.edge.server.http.browser import FLAGS, Browser
from tests.edge.server.http.page_stub import StubServer, page_stub


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="drives the browser")
    browser, service = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or service is None:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(service)) as made:
        yield made


@pytest.fixture
def server() -> Iterator[StubServer]:
    with page_stub() as stub:
        yield stub


@pytest.fixture
def browser(driver: Any, server: StubServer) -> Iterator[Browser]:
    driver.set_window_size(1280, 800)
    driver.get(server.url)
    page = Browser(driver)
    page.complaints()
    yield page
    driver.get("about:blank")
