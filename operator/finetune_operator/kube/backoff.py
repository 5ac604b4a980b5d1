"""How long to wait before the next attempt."""

import random
from dataclasses import dataclass, field

_random = random.Random()  # its own generator: nobody's seed is disturbed, and two replicas never wait alike


@dataclass
class Backoff:
    """Doubles from ``first`` to ``longest`` until ``reset``. Half of each wait is random, so that clients spread."""

    first: float
    longest: float
    failures: int = field(default=0, init=False)
    """In a row."""

    def reset(self) -> None:
        """It worked: the next failure waits ``first`` again."""
        self.failures = 0

    def next(self) -> float:
        """Seconds to wait after one more failure."""
        wait = exponential(self.first, self.longest, self.failures)
        self.failures += 1
        return wait * _random.uniform(0.5, 1)


def exponential(first: float, longest: float, failures: int) -> float:
    """``first``, doubled for each earlier failure, at most ``longest``."""
    return float(min(longest, first * 2 ** min(failures, 60)))


def jitter(seconds: float, share: float) -> float:
    """Up to ``share`` of it more, at random."""
    return seconds * (1 + _random.uniform(0, share))
