"""A real Chromium that opens one page offline, and what can be asked of it."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PROBES = (pathlib.Path(__file__).parent / "probes.js").read_text(encoding="utf-8")


class Browser:
    """One headless window; `open` a file at a width and in a scheme, then `ask` probes.js."""

    def __init__(self, profile: pathlib.Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, page: pathlib.Path, width: int, scheme: str, media: str = "screen") -> None:
        phone = width < 500
        metrics = {
            "width": width,
            "height": 844 if phone else 900,
            "deviceScaleFactor": 2 if phone else 1,
            "mobile": phone,
        }
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        for kind in ("browser", "performance"):  # forget what earlier pages said
            self.driver.get_log(kind)
        self.driver.get(page.as_uri())

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression that may use what probes.js defines."""
        return self.driver.execute_script(f"{PROBES}\nreturn {expression};")

    def requests(self) -> list[str]:
        """What the page asked for, itself and what is inside it (data:) left out."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [
            url
            for url in urls
            if not url.startswith("data:")
            and url.partition("#")[0] != self.driver.current_url.partition("#")[0]
        ]

    def complaints(self) -> list[str]:
        """Everything on the console."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


def opened(profile: pathlib.Path) -> Iterator[Browser]:
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.driver.quit()
