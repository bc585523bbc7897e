"""A headless Chromium, driven over its DevTools protocol through two pipes. It needs no package, only the browser."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_TESTS_READ_PIXELS = "Canvas2D: Multiple readback operations"  # advice that the page itself never causes
_SECONDS = 90.0  # that an answer may take, on a machine that is busy
# The browser reads commands from file 3 and writes answers to file 4.
_START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio")


def find() -> str | None:
    """The program of an installed browser; None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a browser. `requests` and `problems` have what the page asked for and complained of."""

    def __init__(self, program: str, profile: Path):
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        flags = [*_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        command = [sys.executable, "-c", _START, str(read), str(write), program, *flags]
        self._process = subprocess.Popen(command, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self._number, self._unread, self._session = 0, b"", None
        self.requests: list[str] = []
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer. Events that come before are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._message()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]

    def open(self, file: Path, width: int = 1200, height: int = 900, dark: bool = False, touch: bool = False) -> None:
        """Opens a file from the disk in a window of this size, and waits until it is drawn."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=file.absolute().as_uri())
        self.until("document.readyState === 'complete' && document.querySelector('main') !== null")
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """Waits until the expression is true."""
        end = time.monotonic() + _SECONDS
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"{script} stays {found}; {self.problems}"
            time.sleep(0.02)
        return found

    def key(self, key: str, *, down: bool = True, up: bool = True) -> None:
        """Presses a key, and releases it."""
        for kind, wanted in (("keyDown", down), ("keyUp", up)):
            if wanted:
                self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")

    def mouse(self, selector: str, *kinds: str) -> None:
        """Sends mouse events, such as "mousePressed", to the middle of an element."""
        where = "(e => (e.scrollIntoView({block: 'center'}), e.getBoundingClientRect()))(document.querySelector(%s))"
        box = self.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({where % json.dumps(selector)})")
        for kind in kinds:
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def picture(self, file: Path, whole: bool = False) -> None:
        """Writes a picture of the window, or of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **({} if not whole else self._whole()))
        file.write_bytes(base64.b64decode(found["data"]))

    def _whole(self) -> dict[str, Any]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._read], [], [], _SECONDS)
            assert ready, "the browser does not answer"
            more = os.read(self._read, 1 << 20)
            assert more, "the browser has ended"
            self._unread += more
        first, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        self._hear(message.get("method", ""), message.get("params", {}))
        return message

    def _hear(self, event: str, about: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(str(about["exceptionDetails"].get("exception", about["exceptionDetails"])))
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.problems.append(str(about["args"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.problems += [about["entry"]["text"]] * (_TESTS_READ_PIXELS not in about["entry"]["text"])
