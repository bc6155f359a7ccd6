"""Headless Chromium over its own pipe: no driver and no package beside Debian's `chromium`.

`--remote-debugging-pipe` speaks the DevTools protocol in JSON, ended by a zero byte, on descriptors 3 (in) and 4 (out).
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from helpers.events import HANG

FOUND = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Left(AssertionError):
    """The page was left while it was asked."""


class Chromium:
    """One page of one browser, which ends with the block."""

    def __init__(self, folder: Path) -> None:
        to_read, to_write = os.pipe(), os.pipe()

        def place() -> None:
            # The ends may already lie on 3 or 4, so both go out of the way first.
            ends = os.dup(to_read[0]), os.dup(to_write[1])
            high = [os.dup2(end, 100 + number) for number, end in enumerate(ends)]
            for number, end in enumerate(high, 3):
                os.dup2(end, number)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        self._process = subprocess.Popen([FOUND, *flags, "about:blank"], close_fds=False, preexec_fn=place,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read[0])
        os.close(to_write[1])
        self._in, self._out = os.fdopen(to_read[1], "wb", buffering=0), os.fdopen(to_write[0], "rb", buffering=0)
        self._numbers, self._session, self._left, self.requests, self.faults = itertools.count(1), None, b"", [], []

    def __enter__(self) -> "Chromium":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._in.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                said = answer.get("error", {}).get("message", "")
                if "context was destroyed" in said or "Cannot find context" in said or "navigated" in said:
                    raise Left(said)
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            got = self._out.read(2**16)
            assert got, "chromium has ended"
            self._left += got
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what was asked of the network, and what went wrong on the page."""
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(params["exceptionDetails"])[:500])
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.faults.append(params["entry"]["text"])

    def run(self, script: str) -> Any:
        """The value of an expression on the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, address: str, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Go to a page, in a window of this size, as a visitor who prefers light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.run("window.isLeft = true")  # else the page before could be taken for the new one
        self.call("Page.navigate", url=address)
        self.until("!window.isLeft && document.readyState === 'complete'")

    def before(self, script: str) -> None:
        """Run a script in every page that is opened from now on, before its own."""
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def until(self, condition: str) -> None:
        """Look until an expression on the page is true."""
        end = time.monotonic() + HANG
        while not self._holds(condition):
            assert time.monotonic() < end, f"waited in vain for {condition}; the page says: {self._text()[-500:]}"
            time.sleep(0.02)

    def _holds(self, condition: str) -> bool:
        try:
            return bool(self.run(condition))
        except Left:
            return False

    def _text(self) -> str:
        return str(self.run("document.body.innerText"))

    def type(self, text: str) -> None:
        """As from a keyboard, into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, **more: Any) -> None:
        """A key, by its name and its Windows code."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      **(text if kind == "keyDown" else {}), **more)

    def click(self, selector: str) -> None:
        """Click where the element is, as a mouse does: something on top of it would get the click."""
        place = self.run(f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect(); "
                         "return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return path
