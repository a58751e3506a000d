"""The documentation as a browser shows it: every page, at a desktop's width and at a phone's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urldefrag, urlparse
from urllib.request import urlopen

import pytest
from documentation import DOCS

WIDTHS = (1280, 390)  # pixels
PATIENCE = 30  # seconds for any answer of the browser
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="Debian's chromium is not installed")

# What a page shows. Furo's complaints are generated content, which is no part of the text.
LOOK = r"""(() => {
  const elements = [...document.querySelectorAll("*")];
  const generated = elements.flatMap((element) =>
    ["::before", "::after"].map((part) => getComputedStyle(element, part).content));
  const article = document.querySelector("article");
  return JSON.stringify({
    text: document.body.innerText + "\n" + generated.filter((c) => /\w/.test(c)).join("\n"),
    width: document.documentElement.scrollWidth,
    outside: elements.filter((element) => {
      const box = element.getBoundingClientRect();
      return article.contains(element) && box.width > 0
        && (box.right > innerWidth + 1 || box.left < -1)
        && !element.parentElement.closest(".table-wrapper, .math-wrapper, pre, figure");
    }).map((element) => element.outerHTML.slice(0, 100)),
    links: [...document.querySelectorAll("a[href]")].map((link) => link.href),
    images: [...document.images].map((image) => [image.src, image.naturalWidth]),
    formulas: [...document.querySelectorAll("math")].map((formula) => {
      const box = formula.getBoundingClientRect();
      return [formula.textContent, box.width * box.height];
    }),
    anchors: elements.filter((element) => element.id).map((element) => element.id),
  });
})()"""


class Look(NamedTuple):
    """A page at one width."""

    text: str
    width: int
    outside: list[str]  # elements of the article that reach beyond the window and do not scroll
    links: list[str]
    images: list[tuple[str, int]]  # and their own width: 0 where there is none
    formulas: list[tuple[str, float]]  # and their area
    anchors: list[str]


class Browser:
    """One tab of a browser, spoken to by its debugging protocol."""

    def __init__(self, address: str) -> None:
        websocket = pytest.importorskip("websocket")
        self.socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self.calls = 0
        self.requested: set[str] = set()
        self.failures: list[str] = []
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.socket.recv())
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requested.add(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.failures.append(str(parameters["exceptionDetails"]))
        elif method == "Network.loadingFailed":
            self.failures.append(str(parameters))
        return message

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": parameters}))
        while (message := self.receive()).get("id") != self.calls:
            pass
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    def resize(self, width: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def look(self, page: Path) -> Look:
        self.call("Page.navigate", url=page.as_uri())
        while self.receive().get("method") != "Page.loadEventFired":
            pass
        fonts = "document.fonts.ready.then(() => true)"
        self.call("Runtime.evaluate", expression=fonts, awaitPromise=True)
        found = self.call("Runtime.evaluate", expression=LOOK)["result"]
        assert found["type"] == "string", found
        return Look(**json.loads(found["value"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    assert BROWSER is not None
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    options += " --disable-background-networking --disable-component-update --disable-sync"
    options += " --disable-dev-shm-usage --remote-debugging-port=0"
    process = subprocess.Popen(
        [BROWSER, *options.split(), f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HOME": str(folder)},
    )
    try:
        yield Browser(tab(folder / "DevToolsActivePort", process))
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)


def tab(port_file: Path, process: subprocess.Popen[bytes]) -> str:
    """The address of the browser's only tab; the browser writes its port when it is ready."""
    until = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None, f"the browser ended with status {process.returncode}"
        assert time.monotonic() < until, "the browser did not start"
        try:
            port = int(port_file.read_text().split()[0])
            with urlopen(f"http://127.0.0.1:{port}/json", timeout=PATIENCE) as answer:
                pages = [found for found in json.load(answer) if found["type"] == "page"]
            return str(pages[0]["webSocketDebuggerUrl"])
        except (OSError, IndexError, ValueError):
            time.sleep(0.05)


@pytest.fixture(scope="module")
def looks(browser: Browser, site: Path) -> dict[int, dict[str, Look]]:
    """Every page at every width."""
    pages = sorted(site.glob("*.html"))
    found: dict[int, dict[str, Look]] = {}
    for width in WIDTHS:
        browser.resize(width)
        found[width] = {page.name: browser.look(page) for page in pages}
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_show_no_errors_and_no_source(looks: dict[int, dict[str, Look]], width: int) -> None:
    assert {f"{page.stem}.html" for page in DOCS.glob("*.rst")} <= looks[width].keys()
    wrong = r"ERROR|System Message|Undefined|\\frac|\\sum|\\left|\\[a-z]+\{|\$\$|\\\(|:math:|:doc:"
    for name, look in looks[width].items():
        assert re.findall(rf".*(?:{wrong}).*", look.text) == [], name
        assert len(look.text) > 100, name


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_the_window(looks: dict[int, dict[str, Look]], width: int) -> None:
    for name, look in looks[width].items():
        assert look.width <= width, (name, look.outside)
        assert look.outside == [], name


def test_formulas_are_drawn(looks: dict[int, dict[str, Look]]) -> None:
    formulas = [found for look in looks[1280].values() for found in look.formulas]
    assert len(formulas) > 150
    assert [text for text, area in formulas if area <= 0 or "\\" in text] == []


def test_pictures_are_there(looks: dict[int, dict[str, Look]]) -> None:
    shown = [image for look in looks[1280].values() for image in look.images]
    assert [name for name, width in shown if width == 0] == []
    for page in ("index.html", "evidence.html"):
        assert len(looks[1280][page].images) >= 2


def test_links_lead_somewhere(looks: dict[int, dict[str, Look]], site: Path) -> None:
    pages = looks[1280]
    dead = []
    for name, look in pages.items():
        for link in look.links:
            address, anchor = urldefrag(link)
            if urlparse(address).scheme in ("http", "https"):
                continue  # of others; nothing here depends on them
            path = Path(unquote(urlparse(address).path))
            known = pages[path.name].anchors if path.name in pages else []
            there = path.is_file() and site in path.parents
            if not there or (anchor and unquote(anchor) not in known):
                dead.append((name, link))
    assert dead == []


def test_nothing_is_fetched_and_no_script_fails(
    looks: dict[int, dict[str, Look]], browser: Browser, site: Path
) -> None:
    assert len(looks) == len(WIDTHS)
    ours = (site.as_uri(), "data:", "about:blank")
    assert [url for url in sorted(browser.requested) if not url.startswith(ours)] == []
    assert browser.failures == []
