import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import VirtualLoop, virtual_time

from finetune_operator.kube.errors import ConflictError, InvalidError, NotLeadingError, UnreachableError
from finetune_operator.kube.metrics import Metrics
from finetune_operator.kube.settings import QueueSettings
from finetune_operator.kube.workers import run_workers
from finetune_operator.kube.workqueue import QueueClosedError, WorkQueue


def now() -> float:
    """The virtual clock."""
    return asyncio.get_running_loop().time()


def metric(metrics: Metrics, name: str, **labels: str) -> float:
    """A figure's value."""
    return metrics.registry.get_sample_value(name, labels or {"name": "q"}) or 0.0


@virtual_time
async def test_a_key_waits_once() -> None:
    """A key that is added three times before a worker comes is worked on once."""
    queue = WorkQueue[str]()
    for _ in range(3):
        queue.add("a")
    assert len(queue) == 1
    async with queue.take() as key:
        assert key == "a"
    assert len(queue) == 0


@virtual_time
async def test_a_key_added_while_it_is_worked_on_comes_again_afterwards() -> None:
    """No other worker gets a key that one works on; it is ready again as soon as that one is done."""
    queue = WorkQueue[str]()
    queue.add("a")
    async with queue.take():
        queue.add("a")
        queue.add("a")
        assert len(queue) == 0
    assert len(queue) == 1


@virtual_time
async def test_order_of_arrival() -> None:
    """Keys are handed out in the order in which they came."""
    queue = WorkQueue[str]()
    taken = []
    for key in "cab":
        queue.add(key)
    while len(queue):
        async with queue.take() as key:
            taken.append(key)
    assert taken == ["c", "a", "b"]


@virtual_time
async def test_urgent_keys_come_first() -> None:
    """In the order of their arrival; one that waits already keeps its place."""
    queue = WorkQueue[str]()
    taken = []
    for key in "ab":
        queue.add(key)
    for key in "cda":
        queue.add(key, urgent=True)
    assert len(queue) == 4
    while len(queue):
        async with queue.take() as key:
            taken.append(key)
    assert taken == ["c", "d", "a", "b"]


@virtual_time
async def test_add_after_is_due_at_its_time_and_the_earlier_counts() -> None:
    """Of two times the earlier counts, whichever was said last."""
    queue = WorkQueue[str]()
    begin = now()
    queue.add_after("late", 50)
    queue.add_after("a", 30)
    queue.add_after("a", 10)
    queue.add_after("a", 20)
    async with queue.take() as key:
        assert (key, now() - begin) == ("a", 10)
    async with queue.take() as key:
        assert (key, now() - begin) == ("late", 50)


@virtual_time
async def test_failures_wait_ever_longer_and_success_forgets() -> None:
    """A key's waits double up to the cap, plus at most a tenth; after forget they begin anew."""
    queue = WorkQueue[str](settings=QueueSettings(first_wait=1, longest_wait=8, rate=1e9))
    waits = [queue.retry("a") for _ in range(6)]
    for wait, base in zip(waits, [1, 2, 4, 8, 8, 8], strict=True):
        assert base <= wait <= 1.1 * base
    assert queue.failures("a") == 6
    queue.forget("a")
    assert queue.retry("a") <= 1.1


@virtual_time
async def test_failures_of_many_keys_are_spaced_out() -> None:
    """After the burst, retries of all keys together come no faster than the rate; the bucket fills up again."""
    queue = WorkQueue[int](settings=QueueSettings(first_wait=0.001, rate=10, burst=100))
    waits = [queue.retry(key) for key in range(300)]
    assert max(waits[:100]) < 0.01
    assert waits[299] == pytest.approx(20, rel=0.01)
    await asyncio.sleep(60)
    assert queue.retry(1000) < 0.01


@virtual_time
async def test_overruled_times_do_not_pile_up() -> None:
    """A key that is due ever earlier takes no more memory than one."""
    queue = WorkQueue[str]()
    for seconds in range(10_000, 0, -1):
        queue.add_after("a", seconds)
    assert len(queue._heap) < 100
    async with queue.take():
        assert len(queue) == 0
    await asyncio.sleep(20_000)
    assert len(queue) == 0


@virtual_time
async def test_a_cancelled_taker_passes_its_turn_on() -> None:
    """A worker that is cancelled just as a key arrives leaves the key to another."""
    queue = WorkQueue[str]()
    taken = []

    async def work() -> None:
        async with queue.take() as key:
            taken.append(key)

    first, second = asyncio.create_task(work()), asyncio.create_task(work())
    await asyncio.sleep(1)
    queue.add("a")
    first.cancel()
    await second
    assert taken == ["a"]


@virtual_time
async def test_closing_ends_workers_after_what_they_do() -> None:
    """run_workers returns once the keys in hand are done; waiting keys stay undone."""
    queue = WorkQueue[str]("q")
    done = []

    async def handle(key: str) -> None:
        await asyncio.sleep(5)
        done.append(key)

    for key in "abc":
        queue.add(key)
    workers = asyncio.create_task(run_workers(queue, handle, 2))
    await asyncio.sleep(1)
    queue.close()
    await workers
    assert sorted(done) == ["a", "b"]
    with pytest.raises(QueueClosedError):
        async with queue.take():
            pass


@virtual_time
async def test_what_the_handler_returns_or_raises_decides_when_it_is_called_again() -> None:
    """Seconds: then. None: no more. Conflicts and failures: soon, ever later. Terminal: not at all."""
    metrics = Metrics()
    queue = WorkQueue[str]("q", QueueSettings(first_wait=1, longest_wait=64), metrics)
    calls: Counter[str] = Counter()
    first_success: dict[str, float] = {}
    begin = now()

    async def handle(key: str) -> float | None:
        calls[key] += 1
        if key == "again" and calls[key] < 4:
            return 10
        if key == "terminal":
            raise InvalidError("422")
        if key in ("conflict", "down", "bug", "follower") and calls[key] < 4:
            raise {
                "conflict": ConflictError("409"),
                "down": UnreachableError("refused"),
                "bug": KeyError("spec"),
                "follower": NotLeadingError("not"),
            }[key]
        first_success.setdefault(key, now() - begin)
        return None

    for key in ("once", "again", "terminal", "conflict", "down", "bug", "follower"):
        queue.add(key)
    workers = asyncio.create_task(run_workers(queue, handle, 3))
    await asyncio.sleep(1000)
    workers.cancel()
    failing = {"conflict": 4, "down": 4, "bug": 4, "follower": 4}
    assert calls == Counter({"once": 1, "again": 4, "terminal": 1, **failing})
    assert first_success["again"] == 30
    for key in failing:
        assert 7 <= first_success[key] <= 7.7
        assert queue.failures(key) == 0
    assert metric(metrics, "reconcile_errors_total") == 7  # down and bug thrice each, terminal once
    assert metric(metrics, "workqueue_retries_total") == 12
    assert metric(metrics, "reconcile_time_seconds_count") == sum(calls.values())
    assert metric(metrics, "workqueue_adds_total") == sum(calls.values())
    assert metric(metrics, "workqueue_depth") == 0


KEYS = st.sampled_from("abcd")
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "urgent"]), KEYS),
        st.tuples(st.just("after"), KEYS, st.floats(0, 20)),
        st.tuples(st.just("sleep"), st.floats(0, 10)),
        st.tuples(st.just("yield")),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(operations=OPERATIONS, outcomes=st.lists(st.sampled_from(["ok", "fail", 3.0]), max_size=40), n=st.integers(1, 4))
def test_whatever_happens_each_wish_is_met_by_one_worker(operations: list, outcomes: list, n: int) -> None:
    """Under any order of adds, delays and failures: every wish is followed by a call that begins later than the wish
    was made, the last call of each key succeeds, no key has two workers, and in the end nothing is left behind.
    """

    async def scenario() -> None:
        queue = WorkQueue[str]("q", QueueSettings(first_wait=0.5, longest_wait=4))
        step = 0
        wished: dict[str, int] = {}
        begun: dict[str, int] = {}
        working: set[str] = set()
        left = list(outcomes)

        async def handle(key: str) -> float | None:
            nonlocal step
            step += 1
            begun[key] = step
            assert key not in working, "two workers on one key"
            working.add(key)
            await asyncio.sleep(0.7)
            working.discard(key)
            outcome = left.pop() if left else "ok"
            if outcome == "fail":
                raise UnreachableError("down")
            return outcome if isinstance(outcome, float) else None

        workers = asyncio.create_task(run_workers(queue, handle, n))
        for name, *arguments in operations:
            step += 1
            if name == "sleep":
                await asyncio.sleep(arguments[0])
            elif name == "yield":
                await asyncio.sleep(0)
            else:
                key = arguments[0]
                wished[key] = step
                if name == "after":
                    queue.add_after(key, arguments[1])
                else:
                    queue.add(key, urgent=name == "urgent")
        await asyncio.sleep(1000)
        assert begun.keys() == wished.keys()
        assert all(begun[key] > wished[key] for key in wished)
        assert not working
        assert not queue._added
        assert not queue._due
        assert not queue._failures
        assert len(queue) == 0
        queue.close()
        await workers

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())
