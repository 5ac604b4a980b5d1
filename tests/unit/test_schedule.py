import pytest
import torch
from transformers import get_scheduler

from finetune_api.types import Checkpoint, Training
from finetune_jobs.training.schedule import Schedule, checkpoint_interval, learning_rate, plan


@pytest.mark.parametrize(
    ("examples", "training", "steps"),
    [
        (100, Training(epochs=3.0, batch_size=16), 21),
        (96, Training(epochs=3.0, batch_size=16), 18),
        (5, Training(epochs=1.0, batch_size=16), 1),
        (100, Training(epochs=0.1, batch_size=16), 1),
        (100, Training(epochs=0.5, batch_size=10), 5),
        (100, Training(epochs=3.0, batch_size=16, max_steps=4), 4),
    ],
    ids=["uneven", "even", "fewer-than-a-batch", "part-of-a-step", "half-an-epoch", "max-steps"],
)
def test_number_of_steps(examples: int, training: Training, steps: int) -> None:
    """Epochs in steps of ``batchSize`` examples, rounded up; ``maxSteps`` overrides."""
    assert plan(examples, training, seed=1).total_steps == steps


def test_an_epoch_sees_every_example_once_and_in_an_order_of_its_own() -> None:
    """No example is dropped at the end of an epoch; the last step has what is left."""
    schedule = Schedule(examples=10, batch_size=4, total_steps=6, seed=7)
    epochs = [[schedule.batch(step) for step in range(start, start + 3)] for start in (0, 3)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[4, 4, 2], [4, 4, 2]]
    flat = [[i for batch in epoch for i in batch] for epoch in epochs]
    assert [sorted(order) for order in flat] == [list(range(10))] * 2
    assert flat[0] != flat[1]


def test_order_depends_on_the_seed_and_the_step_alone() -> None:
    """Asked for in any order, by any process, a step's examples are the same; these very ones, in every release."""
    one, other = (Schedule(examples=10, batch_size=4, total_steps=6, seed=s) for s in (7, 8))
    backwards = [list(one.batch(step)) for step in reversed(range(6))]
    assert backwards[::-1] == [list(one.batch(step)) for step in range(6)]
    assert [list(one.batch(s)) for s in range(3)] != [list(other.batch(s)) for s in range(3)]
    assert [i for s in range(3) for i in one.batch(s)] == [8, 2, 6, 3, 4, 7, 9, 1, 0, 5]


@pytest.mark.parametrize("total", [10, 100, 250])
@pytest.mark.parametrize(
    ("scheduler", "theirs"),
    [
        ("cosine", "cosine"),
        ("linear", "linear"),
        ("constantWithWarmup", "constant_with_warmup"),
        ("constant", "constant"),
    ],
)
def test_learning_rates_are_those_of_transformers(scheduler: str, theirs: str, total: int) -> None:
    """Step for step, with the warm-up rounded down to whole steps."""
    training = Training(learning_rate=0.01, scheduler=scheduler, warmup_ratio=0.05)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    reference = get_scheduler(theirs, optimizer, num_warmup_steps=int(0.05 * total), num_training_steps=total)
    for step in range(total):
        assert learning_rate(training, step, total) == pytest.approx(reference.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        reference.step()


def test_a_short_run_does_not_waste_its_first_step() -> None:
    """Three per cent of sixteen steps is no step: the first one learns at the full rate."""
    assert learning_rate(Training(learning_rate=0.01), 0, 16) == 0.01


@pytest.mark.parametrize(
    ("checkpoint", "total", "interval"),
    [
        (Checkpoint(), 16, 2),
        (Checkpoint(), 5, 1),
        (Checkpoint(), 1000, 100),
        (Checkpoint(), 100_000, 200),
        (Checkpoint(steps=7), 1000, 7),
    ],
    ids=["rounded-up", "short", "tenth", "at-most", "written"],
)
def test_checkpoint_interval(checkpoint: Checkpoint, total: int, interval: int) -> None:
    """A tenth of the run, at most 200 steps, unless written."""
    assert checkpoint_interval(checkpoint, total) == interval
