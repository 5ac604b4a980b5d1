"""How patient, how fast and how large: one group for each concern. All times are seconds."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HTTPSettings:
    """Requests to the apiserver."""

    user_agent: str = "kube-engine"
    """As in the apiserver's audit log."""

    connect_timeout: float = 10.0
    """From asking for a connection to having it, TLS included."""

    request_timeout: float = 30.0
    """How long the server may be silent before or within its answer, watches apart. The apiserver itself gives up after
    60 s; a queue that tries again later is of more use than a worker that waits."""

    watch_silence: float = 75.0
    """A watch that says nothing for so long is taken for half-open and opened anew. The apiserver sends a bookmark
    each minute, so that a living connection is rarely silent for so long."""

    attempts: int = 4
    """How often a request is sent before its error is raised: reads after any passing failure, writes only where the
    server surely did not carry them out (refused connection, 429)."""

    first_wait: float = 0.2
    """Before the second attempt; doubled each time, and half of it random."""

    longest_wait: float = 10.0
    """Between attempts. A longer ``Retry-After`` is cut to this: the queue's own patience takes over from there."""

    connections: int = 100
    """Open at once, watches included. Beyond them requests wait for each other."""

    refresh: float = 60.0
    """How old a token or certificate that was read from a file may become. The kubelet rotates a token at 80 % of its
    life, at least 2 minutes before it ends."""


@dataclass(frozen=True, kw_only=True)
class ReflectorSettings:
    """Keeping a cache true."""

    page: int = 100
    """Objects in one answer to LIST: keeps the apiserver's and our own memory flat. 500, as
    client-go asks for, are 30 MB while an answer with Jobs is decoded, and more with longer specs."""

    shortest_watch: float = 300.0
    longest_watch: float = 600.0
    """The server ends each watch after a random time between the two, so that many watches never end at once."""

    resync: float = 600.0
    """Every so often each object is handed to ``on_change`` once more, from memory, in case a handler lost something:
    0.1 s for 5,000 objects. 0: never."""

    first_wait: float = 0.8
    """After the first failure; doubled each time, and half of it random. Back to this as soon as an event arrives."""

    longest_wait: float = 30.0
    """Between attempts while the apiserver is down."""


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """When a key that failed is tried again. The figures are client-go's."""

    first_wait: float = 0.05
    """After a key's first failure; doubled with each further one of the same key, and up to a tenth of it random."""

    longest_wait: float = 300.0
    """The most that a failing key waits."""

    rate: float = 10.0
    """Failures of all keys together are tried again at most so often in a second, on average ..."""

    burst: int = 100
    """... after so many at once. An outage that fails every key must not be answered with a storm."""


@dataclass(frozen=True, kw_only=True)
class LeaseSettings:
    """Electing a leader. The figures are client-go's: a dead leader is replaced after 15 to 17.5 s, one that stops
    in order at once.
    """

    duration: float = 15.0
    """How long others wait after the last renewal that they saw before they take over. Written to the Lease in whole
    seconds."""

    renew_deadline: float = 10.0
    """A leader that has not renewed for so long stops writing and is cancelled. What it has then, until ``duration``
    is over, is for a write that is already under way."""

    retry: float = 2.0
    """Between attempts, up to a fifth of it random on top."""

    attempt_timeout: float = 5.0
    """The longest one attempt may take, within the deadline: a hanging apiserver is a failing one."""

    def __post_init__(self) -> None:
        """Refuse figures with which two could lead at once, or nobody could stay leader."""
        if self.duration < 1 or self.duration != int(self.duration):
            raise ValueError(f"duration {self.duration} must be whole seconds, at least 1: a Lease holds no fractions")
        if not self.duration > self.renew_deadline > 1.2 * self.retry > 0:
            raise ValueError(
                f"duration {self.duration} must be longer than renew_deadline {self.renew_deadline}, and that longer "
                f"than 1.2 * retry {self.retry}"
            )


@dataclass(frozen=True, kw_only=True)
class EventSettings:
    """Kubernetes Events: for people who read along, never needed by anything."""

    waiting: int = 500
    """Events not yet sent; beyond them the oldest is dropped."""

    remembered: int = 1000
    """Events whose repetition raises a count instead of making another object."""

    repeat_window: float = 600.0
    """A repetition after longer than this is a new Event."""
