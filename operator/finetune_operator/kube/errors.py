"""What can go wrong between us and an apiserver, by what should happen next.

::

    KubeError
    ├── RetryableError           it may go away by itself: again, backing off
    │   ├── UnreachableError     no answer, or half of one: whether a write happened is unknown
    │   │   └── SilentError      an open watch said nothing for too long: half-open, or nothing happened
    │   ├── ThrottledError       429: not done; the server may say when to come back
    │   ├── ServerError          5xx: whether a write happened is unknown
    │   └── UnauthorizedError    401, with credentials just read anew
    ├── TerminalError            the same request would fail the same way
    │   ├── InvalidError         400, 413, 415, 422 and the like: the object or the request is wrong
    │   └── CredentialsError     there is no configuration, or it cannot be used
    ├── ForbiddenError           403: rights or quota; somebody may mend that, so slowly again
    ├── NotFoundError            404: no such object, or the server does not know the kind (yet)
    ├── AlreadyExistsError       409 on create: the name is taken, perhaps by ourselves
    ├── ConflictError            409: the object changed since it was read, or is another of the same name: read again
    ├── GoneError                410: the resourceVersion or the page is too old: list again
    └── NotLeadingError          we may not write: another replica may be leading by now
        └── LeaseLostError       our turn as leader is over

Messages carry the server's own words and say what was asked for.
"""

from collections.abc import Mapping
from typing import Any


class KubeError(Exception):
    """Base of all."""


class RetryableError(KubeError):
    """The same request may succeed later."""


class UnreachableError(RetryableError):
    """No whole answer came: refused, cut off, timed out. A write may or may not have happened."""


class SilentError(UnreachableError):
    """An open watch said nothing for longer than it should."""


class ThrottledError(RetryableError):
    """The server refused to serve the request now; it was not carried out."""

    def __init__(self, words: str, retry_after: float | None = None) -> None:
        super().__init__(words)
        self.retry_after = retry_after
        """Seconds to wait, if the server said so."""


class ServerError(RetryableError):
    """The server failed; a write may or may not have happened."""


class UnauthorizedError(RetryableError):
    """The credentials were not accepted. Tokens are rotated: the next ones may be."""


class TerminalError(KubeError):
    """Trying the same again is no use."""


class InvalidError(TerminalError):
    """The server refuses the request as it is."""

    def __init__(self, words: str, causes: tuple[Mapping[str, Any], ...] = ()) -> None:
        super().__init__(words)
        self.causes = causes
        """The server's list of what is wrong: ``field``, ``message`` and ``reason`` of each."""


class CredentialsError(TerminalError):
    """No cluster is configured, or its configuration cannot be read."""


class ForbiddenError(KubeError):
    """Our rights, a quota or an admission rule do not allow it."""


class NotFoundError(KubeError):
    """It is not there."""


class AlreadyExistsError(KubeError):
    """An object of that name is there. Whose it is, its controller's uid tells."""


class ConflictError(KubeError):
    """The precondition (resourceVersion, uid) does not hold any more."""


class GoneError(KubeError):
    """The server has forgotten that resourceVersion or page."""


class NotLeadingError(KubeError):
    """A write that only the leader may make."""


class LeaseLostError(NotLeadingError):
    """The lease could not be renewed in time; whoever led until now has been stopped."""


def from_status(code: int, status: Mapping[str, Any], what: str, retry_after: float | None = None) -> KubeError:
    """The error that a ``Status`` object, or an HTTP answer's code, stands for; ``what`` was asked for."""
    reason = str(status.get("reason") or "")
    words = f"{what}: {status.get('message') or reason or f'HTTP {code}'}"
    if code == 429:
        return ThrottledError(words, retry_after)
    if code >= 500:
        return ServerError(words)
    if code == 409:
        return AlreadyExistsError(words) if reason == "AlreadyExists" else ConflictError(words)
    simple: dict[int, type[KubeError]] = {
        401: UnauthorizedError,
        403: ForbiddenError,
        404: NotFoundError,
        410: GoneError,
    }
    if code in simple:
        return simple[code](words)
    return InvalidError(words, tuple((status.get("details") or {}).get("causes") or ()))
