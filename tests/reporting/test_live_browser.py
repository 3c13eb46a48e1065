"""The live page in a real browser, where Chromium, its driver and selenium (the extra `browser`) are there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_live import begin, change

from benchmarks.report_speed import write_runs
from reporting import live

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -e '.[browser]'")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, width: int, theme: str = "light") -> None:
    size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_reader_loses_nothing_while_the_page_follows(
    tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Place, open folds, sorted tables, the scroll of a wide table: as they were, while blocks come, change and go."""
    monkeypatch.setattr(live, "REST", 0.0)
    write_runs(tmp_path, {"baseline": 0.0, "mixup": 0.02, "cutmix": -0.01}, range(3), epochs=4, images=0)
    watcher = live.Watcher([f"runs={tmp_path}"])
    watcher.look()
    script = browser.execute_script
    with live.serving(watcher, 0) as port:
        show(browser, 360)
        browser.get(f"http://localhost:{port}/")
        until(lambda: script("return document.querySelectorAll('figure').length") >= 4)
        script("""
            window.same = 1;  // this page, not one loaded anew
            document.querySelector("details").open = true;
            window.head = [...document.querySelectorAll("h3")].find(h => h.textContent === "Arms");
            head.parentElement.nextElementSibling.querySelectorAll("th button")[2].click();
            head.parentElement.nextElementSibling.querySelector(".scroll").scrollLeft = 40;
            head.scrollIntoView();
        """)
        state = """
            const table = head.parentElement.nextElementSibling;
            return JSON.stringify([window.same, Math.round(head.getBoundingClientRect().top),
              document.querySelector("details").open, table.querySelectorAll("th")[2].ariaSort,
              [...table.querySelectorAll("tbody th")].map(row => row.textContent),
              table.querySelector(".scroll").scrollLeft])
        """
        before = json.loads(script(state))
        assert before[2:4] == [True, "ascending"] and before[4][0] == "cutmix" and before[5] == 40
        run = begin(tmp_path, 8)
        watcher.look()
        until(lambda: "mixup, seed 8" in script("return document.querySelector('main').textContent"))
        assert json.loads(script(state)) == before, "above it a table and a picture have come"
        change(run, status="finished", final={"test/acc": 0.5})
        (run / "claim").unlink()
        watcher.look()
        until(lambda: "seed 8" not in script("return document.querySelector('[data-place]').textContent"))
        until(lambda: "10 ended" in script("return document.querySelector('main').textContent"))
        after = json.loads(script(state))
        assert after[:4] == before[:4] and after[5] == before[5], "the table itself has changed"
        assert script("return head.parentElement.nextElementSibling.textContent").count("4") >= 1
        assert script("return document.documentElement.scrollWidth") <= 360, "nothing sticks out of a phone"
        show(browser, 1280, "dark")
        assert script("return getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    until(lambda: "Not served any more" in script("return document.getElementById('ended').textContent"))
