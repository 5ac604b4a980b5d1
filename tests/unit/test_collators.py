import numpy as np
import pytest
import torch

from finetune_jobs.data.encode import Encoded, EncodedPair
from finetune_jobs.training.collators import Example, Layout, collate, example, pair


def of_length(length: int, supervised: int = 1) -> Example:
    """An example whose last tokens are supervised."""
    return example(Encoded(list(range(1, length + 1)), [i >= length - supervised for i in range(length)]))


SFT = [example(Encoded([5, 6, 7], [False, False, True])), example(Encoded([8, 9, 10, 11], [True, False, True, True]))]


def test_padded_rows() -> None:
    """One row a sequence, padded at the right and masked there; a position predicts the token after it."""
    batch = collate(SFT, packed=False)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.predicts.tolist() == [[False, True, False, False], [False, True, True, False]]
    assert batch.targets.tolist() == [7, 10, 11]
    assert batch.sequence.tolist() == [0, 1, 1]


def test_packed_row() -> None:
    """All in one row without a mask; positions begin anew, which is what keeps the sequences apart."""
    batch = collate(SFT, packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.attention_mask is None
    assert batch.predicts.int().tolist() == [[0, 1, 0, 0, 1, 1, 0]]
    assert batch.targets.tolist() == [7, 10, 11]
    assert batch.sequence.tolist() == [0, 1, 1]
    assert batch.lengths.tolist() == [[3, 3, 3, 4, 4, 4, 4]]


def test_the_first_token_never_counts() -> None:
    """Nothing precedes it, so nothing can predict it: supervised or not, it is no part of the weight."""
    assert [e.supervised for e in SFT] == [1, 2]
    assert collate([SFT[1]], packed=True).targets.tolist() == [10, 11]


def test_a_pair_is_two_sequences_of_which_the_answers_count() -> None:
    """Chosen first; both with the whole prompt; their references in the same order."""
    one = pair(EncodedPair([1, 2], [3, 4], [5])).with_reference([-1.5, -2.5])
    batch = collate([one, one], packed=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 1, 2, 5] * 2]
    assert batch.targets.tolist() == [3, 4, 5] * 2
    assert batch.sequence.tolist() == [0, 0, 1, 2, 2, 3]
    assert batch.reference.tolist() == [-1.5, -2.5] * 2


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(packed=True, tokens=None), [[3, 1, 2, 0]]),
        (Layout(packed=True, tokens=10), [[3], [1], [2, 0]]),
        (Layout(packed=False, tokens=12), [[3], [1], [2, 0]]),
        (Layout(packed=True, tokens=None, examples=3), [[3, 1, 2], [0]]),
        (Layout(packed=True, tokens=1), [[3], [1], [2], [0]]),
    ],
    ids=["all", "packed-tokens", "padding-counts", "examples", "too-long-goes-alone"],
)
def test_micro_batches_of_one_process(layout: Layout, expected: list[list[int]]) -> None:
    """Longest first, as many as fit."""
    assert layout.split([of_length(n) for n in (4, 7, 5, 9)]) == expected


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_share_a_step_without_overlap(processes: int) -> None:
    """Each example is seen by exactly one process, the work is about even, and one may have nothing to do."""
    examples = [of_length(int(n)) for n in np.random.default_rng(0).integers(3, 50, 7)]
    layout = Layout(packed=True, tokens=60)
    shares = [[i for group in layout.split(examples, rank, processes) for i in group] for rank in range(processes)]
    assert sorted(i for share in shares for i in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_passes_that_need_all_processes_are_as_many_in_each(processes: int) -> None:
    """What counts is as without; who has less repeats the shortest example, and it counts nothing."""
    examples = [of_length(int(n)) for n in np.random.default_rng(0).integers(3, 50, 7)]
    layout = Layout(packed=True, tokens=60)
    turns = [list(layout.turns(examples, rank, processes, together=True)) for rank in range(processes)]
    assert len({len(own) for own in turns}) == 1
    for rank, own in enumerate(turns):
        assert [group for group, counts in own if counts] == layout.split(examples, rank, processes)
        shortest = min(range(7), key=lambda i: examples[i].tokens)
        assert all(group == [shortest] for group, counts in own if not counts)
    apart = [list(layout.turns(examples, rank, processes, together=False)) for rank in range(processes)]
    assert [[group for group, _ in own] for own in apart] == [
        layout.split(examples, r, processes) for r in range(processes)
    ]
    assert all(counts for own in apart for _, counts in own)


def test_moving_keeps_all() -> None:
    """On another device the batch is the same, what is not a tensor included."""
    batch = collate(SFT, packed=True).to(torch.device("meta"))
    assert batch.sequences == 2
    assert batch.attention_mask is None
    assert batch.input_ids.device.type == "meta"
