"""A real Chromium without a window, driven over its own protocol."""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab.

    Attributes:
        complaints: What pages wrote to the console as an error, Content-Security-Policy's refusals among it.
        asked: Addresses that pages asked for.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._number = connection, 0
        self.complaints: list[str] = []
        self.asked: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers to a command."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while (message := json.loads(self._connection.recv(timeout=30))).get("id") != self._number:
            self._note(message)
        assert "error" not in message, message
        answer: dict[str, Any] = message["result"]
        return answer

    def _note(self, message: dict[str, Any]) -> None:
        told = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
        elif message.get("method") == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.complaints.append(told["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < deadline, (expression, self.value("document.body.innerText"), self.complaints)
            time.sleep(0.05)

    def write(self, element: str, text: str) -> None:
        """Put the focus on an element by its id, and type in place of what it holds."""
        self.value(f"(() => {{ const one = document.getElementById('{element}'); one.focus(); one.select(); }})()")
        self.send("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0, **more: Any) -> None:
        """Press and let go of a key.

        Args:
            modifiers: 2: Ctrl.
        """
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=modifiers, **more)

    def picture(self, file: Path, *, width: int = 900, dark: bool = False) -> None:
        """Write the whole page as PNG."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        taken = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in `folder`."""
    assert PROGRAM is not None
    words = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server")
    quiet = ("--disable-background-networking", "--disable-component-update", "--no-first-run")
    log = folder / "browser.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [PROGRAM, *words, *quiet, "--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}"],
            stdout=sink,
            stderr=sink,
            env={"HOME": str(folder), "PATH": "/usr/bin:/bin"},
        )
    try:
        deadline = time.monotonic() + 60
        while (found := re.search(r"DevTools listening on ws://([\d.:]+)/", log.read_text(errors="replace"))) is None:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.05)
        with urllib.request.urlopen(f"http://{found[1]}/json/list", timeout=10) as answer:
            tab = next(one for one in json.loads(answer.read()) if one["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=2**26, proxy=None) as connection:
            yield Browser(connection)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
