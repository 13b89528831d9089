"""A headless Chromium, driven over a pipe by its own protocol: no driver, no port, no package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-pipe",
)
_WAIT_MS = 30_000

# The browser reads from descriptor 3 and writes to 4; ours may be any, also these two.
_WIRING = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""

# Resolves when an expression becomes true; looks again whenever the page changes.
_UNTIL = """new Promise((resolve, reject) => {
  const look = () => (%s) && (observer.disconnect(), resolve(document.body.innerText));
  const observer = new MutationObserver(look);
  observer.observe(document, {subtree: true, childList: true, attributes: true});
  setTimeout(() => reject(new Error("not seen: " + document.body.innerText)), %d);
  look();
})"""


class Browser:
    """One page of one browser, which ends with the block.

    Parameters
    ----------
    profile : Path
        An empty folder.
    url : str
    """

    def __init__(self, profile: Path, url: str) -> None:
        assert CHROMIUM is not None
        read_end, self._write_fd = os.pipe()
        self._read_fd, write_end = os.pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _WIRING, str(read_end), str(write_end)),
                *(CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"),
            ],
            pass_fds=(read_end, write_end),
            stderr=subprocess.DEVNULL,
        )
        os.close(read_end)
        os.close(write_end)
        self._url = url
        self._session: str | None = None
        self._rest = b""
        self._events: list[str] = []
        self._num_asked = 0

    def __enter__(self) -> Self:
        try:
            target = self._ask("Target.createTarget", url="about:blank")["targetId"]
            attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
            self._session = str(attached["sessionId"])
            self._ask("Page.enable")
            self._ask("Page.navigate", url=self._url)
            while "Page.loadEventFired" not in self._events:
                self._events.append(self._next().get("method", ""))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._write_fd)
        os.close(self._read_fd)

    def until(self, expression: str) -> str:
        """Wait until a JavaScript expression is true, and return the text of the page."""
        return str(self.run(_UNTIL % (expression, _WAIT_MS)))

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, or what it promises."""
        done = self._ask(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def click(self, label: str) -> None:
        """Click the first button of that label that can be seen."""
        self.run(
            f"[...document.querySelectorAll('button')].find(each => each.checkVisibility() "
            f"&& each.textContent === {json.dumps(label)}).click()"
        )

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._num_asked += 1
        message: dict[str, Any] = {"id": self._num_asked, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._num_asked:
            self._events.append(answer.get("method", ""))
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._read_fd, 65536)
            assert piece, "the browser has ended"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(text)
        return answer
