import asyncio
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import VirtualLoop, virtual_time

from finetune_operator.kube.client import Resource
from finetune_operator.kube.errors import ConflictError, LeaseLostError, NotFoundError, NotLeadingError, ServerError
from finetune_operator.kube.lease import Elector
from finetune_operator.kube.metrics import Metrics
from finetune_operator.kube.settings import LeaseSettings

SETTINGS = LeaseSettings(duration=15, renew_deadline=10, retry=2, attempt_timeout=5)


class Leases:
    """The one Lease of an apiserver, with its resourceVersion; each elector speaks to it through a ``line``."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.writes: list[tuple[float, str]] = []
        """When, and who holds it from then on."""

    def put(self, lease: dict[str, Any]) -> dict[str, Any]:
        """Store it if its version is the newest."""
        if self.lease and lease["metadata"].get("resourceVersion") != self.lease["metadata"]["resourceVersion"]:
            raise ConflictError("409")
        self.version += 1
        self.lease = copy.deepcopy(lease)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        self.writes.append((asyncio.get_running_loop().time(), lease["spec"]["holderIdentity"]))
        return copy.deepcopy(self.lease)


class Line:
    """A client of ``Leases`` that can break."""

    def __init__(self, leases: Leases) -> None:
        self.leases = leases
        self.transport = SimpleNamespace(metrics=Metrics())
        self.trouble = ""
        """"", refused, hang, or deaf: what is asked is done, but the answer never comes."""
        self.asked: list[float] = []

    def without_retries(self) -> "Line":
        """The same."""
        return self

    async def get(self, resource: Resource, namespace: str, name: str) -> dict[str, Any]:
        """The Lease."""

        def read() -> dict[str, Any]:
            if self.leases.lease is None:
                raise NotFoundError("404")
            return copy.deepcopy(self.leases.lease)

        return await self._ask(read)

    async def create(self, resource: Resource, namespace: str, obj: dict[str, Any]) -> dict[str, Any]:
        """Make it."""
        return await self._ask(lambda: self.leases.put(obj))

    async def replace(self, resource: Resource, namespace: str, name: str, obj: dict[str, Any]) -> dict[str, Any]:
        """Overwrite it."""
        return await self._ask(lambda: self.leases.put(obj))

    async def _ask(self, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self.asked.append(asyncio.get_running_loop().time())
        if self.trouble == "refused":
            raise ServerError("503")
        if self.trouble == "hang":
            await asyncio.sleep(1e6)
        await asyncio.sleep(0.05)
        done = do()
        if self.trouble == "deaf":
            await asyncio.sleep(1e6)
        await asyncio.sleep(0.05)
        return done


def an_elector(line: Line, identity: str, settings: LeaseSettings = SETTINGS) -> Elector:
    """One that lives in virtual time."""
    return Elector(line, "ns", "op", identity, settings, clock=asyncio.get_running_loop().time)  # type: ignore[arg-type]


class Work:
    """What a leader does: notes when it began, and when it was stopped."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.ended: float | None = None

    async def __call__(self) -> None:
        """Go on until cancelled."""
        self.began = asyncio.get_running_loop().time()
        try:
            await asyncio.sleep(1e6)
        finally:
            self.ended = asyncio.get_running_loop().time()


@virtual_time
async def test_the_first_leads_and_the_second_waits() -> None:
    """One of two leads for as long as it renews; the other knows who it is and may not write."""
    leases = Leases()
    one, two = an_elector(Line(leases), "one"), an_elector(Line(leases), "two")
    work, other = Work(), Work()
    tasks = [asyncio.create_task(one.run(work))]
    await asyncio.sleep(1)
    tasks.append(asyncio.create_task(two.run(other)))
    await asyncio.sleep(600)
    assert one.leading
    one.check()
    assert work.ended is None
    assert other.began is None
    assert two.holder == "one"
    with pytest.raises(NotLeadingError, match="two does not hold"):
        two.check()
    assert leases.lease is not None
    assert leases.lease["spec"]["leaseTransitions"] == 0
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@virtual_time
async def test_a_leader_told_to_stop_gives_the_lease_back() -> None:
    """Its work is cancelled first, then the lease is free, and the next one leads within one retry."""
    leases = Leases()
    one, two = an_elector(Line(leases), "one"), an_elector(Line(leases), "two")
    work, other = Work(), Work()
    first, second = asyncio.create_task(one.run(work)), asyncio.create_task(two.run(other))
    await asyncio.sleep(30)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    stopped = asyncio.get_running_loop().time()
    assert work.ended is not None
    assert leases.writes[-1][1] == ""
    assert not one.leading
    await asyncio.sleep(3)
    assert other.began is not None
    assert other.began <= stopped + 2.4 + 0.2
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)


@virtual_time
async def test_the_lease_is_given_back_even_if_a_renewal_was_cut_short() -> None:
    """Stopped after the server had renewed and before it said so: the lease is free all the same."""
    leases = Leases()
    task = asyncio.create_task(an_elector(Line(leases), "one").run(Work()))
    await asyncio.sleep(10)
    written = len(leases.writes)
    while len(leases.writes) == written:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert leases.writes[-1][1] == ""


@virtual_time
async def test_work_that_ends_by_itself_ends_the_turn() -> None:
    """run returns when the work does, raises what it raises, and the lease is free in both cases."""
    leases = Leases()

    async def succeed() -> None:
        await asyncio.sleep(5)

    async def fail() -> None:
        raise KeyError("spec")

    await an_elector(Line(leases), "one").run(succeed)
    assert leases.writes[-1][1] == ""
    with pytest.raises(KeyError):
        await an_elector(Line(leases), "two").run(fail)
    assert leases.writes[-1][1] == ""


@pytest.mark.parametrize("trouble", ["refused", "hang", "deaf"])
def test_a_cut_off_leader_stops_at_the_renew_deadline(trouble: str) -> None:
    """Refused or hung alike: no later than the deadline after the last good renewal, before the lease ends; nobody
    else leads before that.
    """

    @virtual_time
    async def scenario() -> None:
        leases = Leases()
        line = Line(leases)
        one, two = an_elector(line, "one"), an_elector(Line(leases), "two")
        work, other = Work(), Work()
        first, second = asyncio.create_task(one.run(work)), asyncio.create_task(two.run(other))
        await asyncio.sleep(30)
        written = len(leases.writes)
        while len(leases.writes) == written:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.1)
        last_good = one._renewed
        line.trouble = trouble
        with pytest.raises(LeaseLostError):
            await first
        assert last_good is not None
        assert work.ended is not None
        # "deaf": the write arrives and counts for the others, but we do not know and stop all the same.
        assert work.ended == pytest.approx(last_good + SETTINGS.renew_deadline, abs=0.01)
        await asyncio.sleep(60)
        assert other.began is not None
        assert other.began >= last_good + SETTINGS.duration
        assert other.began > work.ended
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)

    scenario()


@virtual_time
async def test_a_frozen_leader_may_not_write_from_its_first_moment_on() -> None:
    """When the clock has jumped past the deadline, check fails before any task of ours has run again, and the elector
    makes no further attempt.
    """
    leases = Leases()
    line = Line(leases)
    one = an_elector(line, "one")
    work = Work()
    task = asyncio.create_task(one.run(work))
    await asyncio.sleep(10)
    one.check()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.now += 10.0
    with pytest.raises(NotLeadingError):
        one.check()
    asked = len(line.asked)
    with pytest.raises(LeaseLostError):
        await task
    assert len(line.asked) == asked
    assert leases.writes[-1][1] == "one"  # not given back either: it may be another's by now


@virtual_time
async def test_a_leader_whose_lease_was_taken_stops_at_once() -> None:
    """It sees another holder, and does not wait for the deadline nor try to take the lease back."""
    leases = Leases()
    one = an_elector(Line(leases), "one")
    work = Work()
    task = asyncio.create_task(one.run(work))
    await asyncio.sleep(10)
    assert leases.lease is not None
    leases.put({**leases.lease, "spec": {**leases.lease["spec"], "holderIdentity": "thief"}})
    taken = asyncio.get_running_loop().time()
    with pytest.raises(LeaseLostError, match="thief holds it"):
        await task
    assert work.ended is not None
    assert work.ended - taken < 3
    assert leases.writes[-1][1] == "thief"


@virtual_time
async def test_a_stale_lease_of_the_dead_is_taken_after_it_was_seen_for_its_own_duration() -> None:
    """Whatever its times say: nobody's clock is compared with ours."""
    leases = Leases()
    dead = {"holderIdentity": "dead", "leaseDurationSeconds": 40, "renewTime": "2100-01-01T00:00:00.000000Z"}
    leases.put({"metadata": {"name": "op"}, "spec": dead})
    one = an_elector(Line(leases), "one")
    work = Work()
    began = asyncio.get_running_loop().time()
    task = asyncio.create_task(one.run(work))
    await asyncio.sleep(60)
    assert work.began is not None
    assert 40 <= work.began - began <= 43
    assert leases.lease is not None
    assert leases.lease["spec"]["leaseTransitions"] == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_settings_that_could_make_two_leaders_are_refused() -> None:
    """The renew deadline must come before the lease's end, and leave time for more than one attempt."""
    with pytest.raises(ValueError, match="must be longer than renew_deadline"):
        LeaseSettings(duration=10, renew_deadline=10)
    with pytest.raises(ValueError, match=r"longer than 1\.2 \* retry"):
        LeaseSettings(duration=15, renew_deadline=2, retry=2)
    with pytest.raises(ValueError, match="whole seconds"):
        LeaseSettings(duration=15.5)


TROUBLES = st.lists(
    st.tuples(st.floats(0.1, 30), st.integers(0, 2), st.sampled_from(["", "", "refused", "hang", "deaf", "stop"])),
    max_size=15,
)


@settings(max_examples=50, deadline=None)
@given(TROUBLES)
def test_never_two_who_may_write(troubles: list[tuple[float, int, str]]) -> None:
    """With three electors whose lines break at random and who are stopped and started anew, at no moment do two pass
    the fence; once all is well again, one leads.
    """

    @virtual_time
    async def scenario() -> None:
        leases = Leases()
        lines = [Line(leases) for _ in range(3)]
        electors = [an_elector(line, str(number)) for number, line in enumerate(lines)]
        tasks = [asyncio.create_task(elector.run(Work())) for elector in electors]
        restarts = 0

        async def observe(seconds: float) -> None:
            end = asyncio.get_running_loop().time() + seconds
            while asyncio.get_running_loop().time() < end:
                leaders = [elector.identity for elector in electors if elector.leading]
                assert len(leaders) <= 1, leaders
                await asyncio.sleep(0.5)

        def start_anew(number: int) -> None:
            nonlocal restarts
            restarts += 1
            electors[number] = an_elector(lines[number], f"{number}-{restarts}")
            tasks[number] = asyncio.create_task(electors[number].run(Work()))

        for seconds, number, trouble in troubles:
            await observe(seconds)
            if trouble == "stop":
                tasks[number].cancel()
                await asyncio.wait([tasks[number]])
                start_anew(number)
            else:
                lines[number].trouble = trouble
            for n, task in enumerate(tasks):
                if task.done():
                    assert isinstance(task.exception(), LeaseLostError)
                    start_anew(n)
        for line in lines:
            line.trouble = ""
        await observe(60)
        assert sum(elector.leading for elector in electors) == 1 or any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    scenario()
