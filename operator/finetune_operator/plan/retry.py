"""What an attempt's end means: try again or not, and does it count. DESIGN.md's table of exit codes, in code."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.status import Reason
from finetune_operator.plan import deadline
from finetune_operator.plan.children import Child

_FINAL: dict[int | None, Reason] = {
    64: Reason.BAD_CONFIGURATION,
    65: Reason.BAD_DATA,
    66: Reason.INPUT_MISSING,
}
_COUNTED: dict[int | None, Reason] = {
    0: Reason.NO_RESULT,
    69: Reason.STORAGE_UNAVAILABLE,
    70: Reason.STAGE_ERROR,
    76: Reason.PEER_LOST,
    137: Reason.KILLED,
}
_SHOVED_ASIDE = (75, 143)
_DISRUPTIONS = ("DisruptionTarget", "Preempted", "NodeLost")
_CAUSES = {
    "OOMKilled": Reason.OUT_OF_MEMORY,
    "Evicted": Reason.DISK_FULL,
    "PodRefused": Reason.POD_REFUSED,
}
_WORDS = {
    Reason.OUT_OF_MEMORY: "killed at its memory limit",
    Reason.KILLED: (
        "killed (SIGKILL), though not at a memory limit of its own: "
        "by the kernel when the machine's memory ran out, or by somebody"
    ),
    Reason.DISK_FULL: "evicted: its workspace, or the node's disk, is full",
    Reason.PREEMPTED: "shoved aside",
    Reason.NO_RESULT: "ended with exit code 0, but left no result",
    Reason.POD_REFUSED: "the node refused its pod",
}
_FIRST_WAIT = timedelta(seconds=10)
LONGEST_WAIT = timedelta(minutes=5)


@dataclass(frozen=True)
class Verdict:
    """What an attempt without a result came to."""

    reason: Reason
    message: str
    final: bool = False
    """Another attempt would end the same."""
    counted: bool = True
    """Against the stage's ``retries``: it was the stage's own failure."""


def judge(child: Child) -> Verdict:
    """Why an ended attempt has no result, and what follows."""
    code = _exit_code(child)
    said = child.termination.error if child.termination and child.termination.error else ""
    if child.cause in _DISRUPTIONS or code in _SHOVED_ASIDE:
        words = ": ".join(part for part in (child.message, said) if part)
        return Verdict(Reason.PREEMPTED, words or _WORDS[Reason.PREEMPTED], counted=False)
    if code in _FINAL:
        return Verdict(_FINAL[code], said or f"exit code {code}", final=True)
    reason = _CAUSES.get(child.cause) or _COUNTED.get(code, Reason.STAGE_ERROR)
    # Whatever a stage wrote last before it was killed, the platform knows better why.
    platform = child.message if child.cause in _CAUSES else _WORDS[reason] if reason is Reason.KILLED else ""
    words = (
        platform
        or said
        or _WORDS.get(reason)
        or (f"exit code {code}" if code is not None else child.cause or "no exit code")
    )
    # Who is asked to stop and does not make it within the grace period is killed: no failure of its own. Nor is a pod
    # that a node would not take.
    return Verdict(reason, words, counted=not (child.deleting or reason is Reason.POD_REFUSED))


def _exit_code(child: Child) -> int | None:
    """As a shell reports it: 128 + the signal's number for a process that died of one."""
    code = 0 if child.exit_code is None and child.state == "Succeeded" else child.exit_code
    return 128 - code if code is not None and code < 0 else code


def wait(failures: int) -> timedelta:
    """How long after the nth counted failure the next attempt starts: 10 s, doubled each time, at most 5 min."""
    return min(LONGEST_WAIT, _FIRST_WAIT * (1 << min(failures - 1, 10)))


def pause(child: Child, uncounted: int, now: datetime) -> timedelta:
    """How long after an end that does not count: not at all, unless the attempt had only just begun.

    A stage that is shoved aside at once, ever again, must not flood the cluster with attempts.
    """
    longest = wait(max(1, uncounted))
    return timedelta() if child.deleting or deadline.ran(child, now) >= longest else longest
