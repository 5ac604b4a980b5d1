"""Being told to stop: a flag that SIGTERM or SIGINT sets and that every long loop reads.

Standard library only, so that ``install`` can run before anything slow is imported.
"""

import signal
from types import FrameType

from finetune_jobs.run.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether this stage was told to stop. It stays told: a second signal changes nothing."""

    def __init__(self) -> None:
        self._requested = False

    @property
    def requested(self) -> bool:
        """SIGTERM or SIGINT has come."""
        return self._requested

    def request(self) -> None:
        """Tell the stage to stop, as the signals do."""
        self._requested = True

    def check(self) -> None:
        """Raise ``PreemptedError`` once the stage was told to stop: for work that has nothing to save."""
        if self.requested:
            raise PreemptedError("told to stop; the next attempt goes on from what is committed")


def install() -> Stop:
    """Make SIGTERM and SIGINT set the flag of the returned ``Stop``, and do nothing else, from now on."""
    stop = Stop()

    def handle(signum: int, frame: FrameType | None) -> None:
        # Nothing else is safe here: the signal may have come in the middle of anything, an import included.
        stop.request()

    for signum in SIGNALS:
        signal.signal(signum, handle)
    # Whoever started this process may have held them back until now, so that none came before the handler.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return stop
