"""A headless Chromium, to see MLflow's page as a user does; a script for screenshots as well.

    python tests/browser.py 'http://127.0.0.1:5000/#/experiments/1/runs' page.png [TEXT TO WAIT FOR]

The browser is Debian's or the one that CHROMIUM names; playwright downloads none.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any
from urllib import request

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# MLflow opens its assistant over a quarter of the page on a first visit.
_NO_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"


def executable() -> str | None:
    """Name the browser there is."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium", path="/usr/bin")


def missing() -> str | None:
    """Say what is missing to look at a page; None if nothing is."""
    if util.find_spec("playwright") is None:
        return "playwright is not installed"
    return None if executable() else "no chromium; name one in CHROMIUM"


@contextlib.contextmanager
def page(width: int = 1600, height: int = 1000) -> Iterator[Any]:
    """Open an empty page (playwright's `Page`), without MLflow's greetings."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=FLAGS)
        try:
            opened = browser.new_page(viewport={"width": width, "height": height})
            opened.add_init_script(_NO_ASSISTANT)
            yield opened
        finally:
            browser.close()


def look(page: Any, url: str, text: str | None = None, seconds: float = 60) -> None:
    """Go to a page and wait until it shows `text`, if given; it never falls silent by itself."""
    page.goto(url, timeout=seconds * 1000)
    if text is not None:
        page.get_by_text(text).first.wait_for(timeout=seconds * 1000)


@contextlib.contextmanager
def server(command: list[str], environment: dict[str, str], url: str, seconds: float = 240) -> Iterator[None]:
    """Run MLflow's server while inside; it answers at `url` from the beginning."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        end = time.monotonic() + seconds
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{url}: the server has not come up: {command}")
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with request.urlopen(f"{url}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def main(url: str, to: str, text: str | None = None) -> None:
    """Write a screenshot of `url`."""
    with page() as opened:
        look(opened, url, text)
        opened.wait_for_timeout(5000)  # charts draw themselves in
        Path(to).write_bytes(opened.screenshot())


if __name__ == "__main__":
    main(*sys.argv[1:])
