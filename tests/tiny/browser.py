"""A headless Chromium, driven over its debugging pipe: no driver, no port, no package."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip
_BEGIN = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
    os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""The browser hears on descriptor 3 and answers on 4, wherever our ends of the pipes are."""
_PATIENCE = 60  # seconds for one answer: a machine may be busy


def find() -> str | None:
    """A Chromium on this machine; CHROMIUM names another."""
    names = [os.environ["CHROMIUM"]] if "CHROMIUM" in os.environ else [*NAMES, *_PLACES]
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def opened(folder: Path) -> "Iterator[Tab]":
    """A tab of a browser whose profile lies in `folder`; skips the test where there is no browser."""
    program = find()
    if program is None:
        pytest.skip("no Chromium was found on this machine (CHROMIUM=PATH names one)")
    (hear, answer), (asked, ask) = os.pipe(), os.pipe()
    command = [sys.executable, "-ESc", _BEGIN, str(asked), str(answer), program, *_OPTIONS, f"--user-data-dir={folder}"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, pass_fds=(asked, answer), stdout=quiet, stderr=quiet, stdin=quiet)
    os.close(asked)
    os.close(answer)
    tab = Tab(hear, ask)
    try:
        tab.open()
        yield tab
    finally:
        tab.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(hear)
        os.close(ask)


class Tab:
    """One page: what it says on its console, what a script finds in it, how it looks."""

    def __init__(self, hear: int, ask: int) -> None:
        self._hear, self._ask, self._count, self._rest = hear, ask, 0, b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def open(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Ask, and wait for the answer; what comes in between is an event."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._ask, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._next()
            if heard.get("id") == self._count:
                assert "error" not in heard, (method, heard["error"])
                return heard["result"]
            self.events.append(heard)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select([self._hear], [], [], _PATIENCE)
            assert ready, "the browser does not answer"
            data = os.read(self._hear, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def visit(self, page: Path, width: int = 1280, dark: bool = False) -> None:
        """Load a file in a window of this width, and wait until it is there."""
        self.events.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def find(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key, as somebody at the keyboard presses it."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and every request for anything but the page itself."""
        self.find("1")  # what happened before has been told when this is answered
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif method == "Runtime.exceptionThrown" or (
                method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
            ):
                found.append(json.dumps(params))
            elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("data:", "file:")):
                found.append(params["request"]["url"])
        return found

    def picture(self, target: Path, whole: bool = True) -> None:
        """A screenshot of the window, or of the whole page."""
        import base64

        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        target.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        self._session = None
        try:
            self.call("Browser.close")
        except (AssertionError, OSError):
            return
