import os
import signal
import subprocess
import sys
import textwrap

import pytest

from finetune_jobs.run.errors import PreemptedError
from finetune_jobs.run.preemption import SIGNALS, Stop, install


def test_nothing_happens_until_told() -> None:
    """Checking costs nothing and raises nothing."""
    stop = Stop()
    stop.check()
    assert not stop.requested


def test_once_told_every_check_raises() -> None:
    """The error is the one whose exit code does not count against the retries."""
    stop = Stop()
    stop.request()
    assert stop.requested
    with pytest.raises(PreemptedError) as raised:
        stop.check()
    assert raised.value.exit_code == 75


@pytest.mark.parametrize("signum", SIGNALS, ids=["SIGTERM", "SIGINT"])
def test_signals_set_the_flag_and_nothing_else(signum: signal.Signals) -> None:
    """A second and a third one change nothing, and interrupt nothing."""
    before = [signal.getsignal(s) for s in SIGNALS]
    try:
        stop = install()
        for _ in range(3):
            os.kill(os.getpid(), signum)
        assert stop.requested
    finally:
        for s, handler in zip(SIGNALS, before, strict=True):
            signal.signal(s, handler)


def test_a_signal_held_back_is_not_lost() -> None:
    """A launcher may block the signals until the handler is there; what came meanwhile arrives then."""
    program = """
        import os, signal
        from finetune_jobs.run.preemption import SIGNALS, install
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        os.kill(os.getpid(), signal.SIGTERM)
        assert install().requested
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode == 0


def test_the_handler_comes_before_anything_slow() -> None:
    """Installing needs the standard library alone, and the entry point does it before its other imports."""
    program = """
        import sys
        from finetune_jobs.run import preemption
        slow = {"torch", "transformers", "boto3", "pydantic", "numpy"} & set(sys.modules)
        assert not slow, slow
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode == 0
