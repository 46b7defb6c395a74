"""A browser for the page; skipped where Debian's chromium and chromium-driver are missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundles, write_secret
from tests.edge_serve.http.browser import FLAGS, REAL_KEY, Browser
from tests.edge_serve.http.page_stub import StubServer, page_stub
from tests.edge_serve.scripted import Live, running


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what a browser shows of the stub: that is the page's own doing."""
    if "browser" in getattr(item, "fixturenames", ()):
        item.add_marker("once")


@pytest.fixture(scope="package")
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
    # The port may be one of an earlier test, whose conversations the browser still has.
    site = {"origin": server.url, "storageTypes": "all"}
    driver.execute_cdp_cmd("Storage.clearDataForOrigin", site)
    driver.get(server.url)
    page = Browser(driver)
    page.started()
    page.complaints()
    yield page
    driver.get("about:blank")


@pytest.fixture
def real(driver: Any, tiny_bundles: Bundles, tmp_path: Path) -> Iterator[tuple[Browser, Live]]:
    """The page as the service serves it, on an engine that says what it is told to."""
    keys = tmp_path / "keys"
    write_secret(keys, f"me:{REAL_KEY}\n")
    with running(tiny_bundles("qwen2"), api_key_file=keys) as live:
        driver.set_window_size(1280, 800)
        driver.get(live.url)
        page = Browser(driver)
        page.until(lambda: "API key" in page.one("#state").text)
        page.one("#key").send_keys(REAL_KEY, page.keys.ENTER)
        page.until(lambda: page.one("#state").get_attribute("class") == "up")
        page.complaints()
        yield page, live
        driver.get("about:blank")
