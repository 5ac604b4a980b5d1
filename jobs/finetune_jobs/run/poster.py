"""Tells the operator how far the stage is, from a thread of its own: the stage neither waits for it nor fails by it.

The standard library alone, and nothing of it draws from Python's global random generator: the data order of a training
must not depend on whether somebody listens.
"""

import http.client
import logging
import ssl
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

_log = logging.getLogger("finetune.progress")

FLUSH_SECONDS = 2.0
"""What the end of a stage may take longer for its last update."""
_LONGEST_SECONDS = 60.0
"""Between two tries while nobody answers."""
_HOPELESS = (400, 413)
"""The same again would be refused again."""


def pause(interval: float, failures: int) -> float:
    """Seconds before the next post, after so many in a row that failed."""
    return max(interval, min(_LONGEST_SECONDS, interval * 2.0 ** min(failures, 10)))


class Poster:
    """Posts the latest update over TLS, at most every ``interval`` seconds; those between are never sent."""

    def __init__(self, url: str, token: Path, ca: Path, *, interval: float = 5.0, timeout: float = 5.0) -> None:
        """``token`` and ``ca`` are read anew each time: the kubelet replaces both."""
        self._url = urlsplit(url)
        self._token = token
        self._ca = ca
        self._interval = interval
        self._timeout = timeout
        self._changed = threading.Condition()
        self._latest: bytes | None = None
        self._closing = False
        self._failures = 0
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Poster | None":
        """As the pod's environment says; None where nobody wants to know, and in all processes but the first."""
        url = environment.get("FINETUNE_PROGRESS_URL", "")
        token, ca = (environment.get(f"FINETUNE_PROGRESS_{name}_FILE", "") for name in ("TOKEN", "CA"))
        if not url or int(environment.get("RANK", "0")) > 0:
            return None
        if not url.startswith("https://") or not token or not ca:
            _log.warning(
                "FINETUNE_PROGRESS_URL needs https://, FINETUNE_PROGRESS_TOKEN_FILE and FINETUNE_PROGRESS_CA_FILE: "
                "nobody is told of the progress"
            )
            return None
        return cls(url, Path(token), Path(ca))

    def offer(self, update: bytes) -> None:
        """Send it when it is time, unless a later one comes first. Never waits."""
        with self._changed:
            self._latest = update
            self._changed.notify()

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Send what is not sent yet, once and at once; return after ``seconds`` in any case."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        again = float("-inf")
        while (update := self._next(again)) is not None:
            if self._send(update):
                self._failures = 0
            else:
                self._failures += 1
                with self._changed:
                    if self._latest is None and not self._closing:
                        self._latest = update
            again = time.monotonic() + pause(self._interval, self._failures)

    def _next(self, not_before: float) -> bytes | None:
        """The update to send, once it is time; None at the end."""
        with self._changed:
            while not self._closing:
                if self._latest is None:
                    self._changed.wait()
                elif (left := not_before - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    break
            update, self._latest = self._latest, None
            return update

    def _send(self, update: bytes) -> bool:
        """Whether it need not be sent again."""
        try:
            status, words = self._post(update)
        except Exception as error:  # whatever it is, the stage goes on
            self._complain(f"{type(error).__name__}: {error}")
            return False
        if status >= 300:
            self._complain(f"{status} {words}")
        return status < 300 or status in _HOPELESS

    def _post(self, update: bytes) -> tuple[int, str]:
        # Only the operator's own certificates count, none of the system's, and no proxy lies between.
        context = ssl.create_default_context(cafile=str(self._ca))
        headers = {"Authorization": f"Bearer {self._token.read_text().strip()}", "Content-Type": "application/json"}
        server = http.client.HTTPSConnection(
            self._url.hostname or "", self._url.port, timeout=self._timeout, context=context
        )
        try:
            server.request("POST", self._url.path, update, headers)
            answer = server.getresponse()
            return answer.status, answer.read(200).decode(errors="replace").strip()
        finally:
            server.close()

    def _complain(self, words: str) -> None:
        """Once, so that it can be found; a stage of days must not fill its log with it."""
        level = logging.DEBUG if self._complained else logging.WARNING
        self._complained = True
        _log.log(level, "the operator was not told of the progress, the stage goes on: %s", words)
