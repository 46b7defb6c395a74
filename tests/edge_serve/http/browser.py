"""A real browser with the page in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SCREENSHOTS = os.environ.get("EDGE_LLM_SCREENSHOTS")
"""A directory to leave pictures of the page in, for people to look at."""
WAIT_S = 15
REAL_KEY = "a-key-of-the-real-service"

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    # A name for this machine that is no "localhost": pages from there are not trusted with all.
    "--host-resolver-rules=MAP jetson.test 127.0.0.1",
)


class Browser:
    """The page as a person has it before them."""

    def __init__(self, driver: Any) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.driver, self.by, self.keys = driver, By, Keys

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(self.by.CSS_SELECTOR, selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element(self.by.CSS_SELECTOR, selector)

    def until(self, condition: Any) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(
            self.driver, WAIT_S, 0.05, ignored_exceptions=[StaleElementReferenceException]
        )
        return wait.until(lambda _: condition())

    def started(self) -> None:
        """Wait until the page shows what it has."""
        self.until(lambda: self.all("body.started"))

    def reload(self) -> None:
        """Load the page again."""
        self.driver.refresh()
        self.started()

    def let_time_pass(self) -> None:
        """Move the page's clock at every reading: a whole answer may come in one read."""
        self.driver.execute_script("let now = 0; performance.now = () => (now += 5);")

    def ask(self, text: str) -> None:
        self.until(lambda: self.one("#state").get_attribute("class") == "up")
        self.one("#prompt").send_keys(text, self.keys.ENTER)

    def open_panel(self) -> None:
        """Show settings and status."""
        self.until(lambda: self.one("#panel-toggle").is_displayed())
        if not self.one("#panel").is_displayed():
            self.one("#panel-toggle").click()

    def open_list(self) -> None:
        """Show the conversations."""
        if not self.one("#list").is_displayed():
            self.one("#list-toggle").click()

    def answered(self) -> Any:
        """The last answer, once it is whole."""
        self.until(lambda: self.all(".turn.assistant:last-child .facts span"))
        self.until(lambda: self.one("#send").is_displayed())
        return self.one(".turn.assistant:last-child")

    def complaints(self) -> list[str]:
        """What the browser wrote into its console, failed requests apart."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if "Failed to load resource" not in entry["message"]
        ]

    def picture(self, name: str) -> None:
        if SCREENSHOTS:
            self.driver.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))
