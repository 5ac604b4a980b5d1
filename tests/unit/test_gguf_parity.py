from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from finetune_jobs.gguf import parity
from finetune_jobs.gguf.parity import Parity

GOOD = Parity(
    kl=1e-5,
    kl_error=0.0,
    top1=1.0,
    top1_sure=1.0,
    tokens=1000,
    rows=20,
    prompts=20,
    texts=29,
    differences=[],
    stop_token="<|im_end|>",
    stop_known=True,
    stops=20,
    stops_expected=20,
    generated=4,
    finished=4,
)


@pytest.mark.parametrize(
    ("kind", "changed", "words"),
    [
        ("F16", {}, []),
        ("F16", {"kl": 1.1e-4}, ["mean KL divergence 1.10e-04 +- 0e+00 over 1000 tokens, at most 0.0001"]),
        ("BF16", {"kl": 9e-4}, []),
        ("BF16", {"kl": 2e-3}, ["mean KL divergence 2.00e-03 +- 0e+00 over 1000 tokens, at most 0.001"]),
        ("F16", {"top1": 0.99, "top1_sure": 0.999}, []),
        ("F16", {"top1": 0.99, "top1_sure": 0.998}, ["top-1 agreement 0.9980 over 1000 tokens"]),
        ("F16", {"top1_sure": 0.9, "tokens": 10}, []),
        ("F16", {"top1_sure": 0.8, "tokens": 10}, ["top-1 agreement 0.8000 over 10 tokens"]),
        ("Q8_0", {"kl": 4.9e-3, "top1_sure": 0.991}, []),
        ("Q8_0", {"kl": 5.1e-3, "top1_sure": 0.98}, ["mean KL", "top-1 agreement 0.9800"]),
        ("Q8_0", {"kl": 6e-3, "kl_error": 6e-4}, []),
        ("Q8_0", {"kl": 6e-3, "kl_error": 4e-4}, ["mean KL divergence 6.00e-03 +- 4e-04"]),
        ("Q6_K", {"kl": 1.9e-2, "top1_sure": 0.5}, []),
        ("Q6_K", {"kl": 2.1e-2}, ["mean KL divergence 2.10e-02"]),
        ("Q4_K_M", {"kl": 0.09, "top1_sure": 0.971}, []),
        ("Q4_K_M", {"kl": float("nan")}, ["mean KL divergence nan"]),
        ("Q5_K_M", {"top1_sure": 0.96}, ["top-1 agreement 0.9600"]),
        ("Q2_K", {"kl": 9.0, "top1_sure": 0.1}, []),
        ("Q2_K", {"differences": ["it renders the prompt otherwise"]}, ["it renders the prompt otherwise"]),
        ("Q3_K_M", {"stop_known": False}, ["does not end an answer at '<|im_end|>'"]),
        ("Q3_K_M", {"stops": 9}, ["it would stop at 9 of the 20 places"]),
        ("Q3_K_M", {"stops": 0, "stops_expected": 0}, []),
        ("Q3_K_M", {"stops": 0, "stops_expected": 1}, []),
        ("Q3_K_M", {"stops": 0, "stops_expected": 2}, ["it would stop at 0 of the 2 places"]),
    ],
)
def test_bounds_are_those_of_the_practice(kind: str, changed: dict[str, Any], words: list[str]) -> None:
    """Each type has its own bounds, prompts and stop token bind every type, and one token alone is no evidence."""
    found = replace(GOOD, **changed).failures(kind)
    assert len(found) == len(words)
    assert all(expected in given for expected, given in zip(words, found, strict=True))


def test_a_stop_is_expected_where_the_model_is_sure_of_it() -> None:
    """A place where the stop token is likeliest, but below 1/2, says nothing about a GGUF that goes on there."""
    probabilities = np.array([[0.1, 0.9], [0.9, 0.1], [0.6, 0.4], [0.49, 0.51]])
    spread = np.array([[0.3, 0.3, 0.4]])
    assert parity.stop_places(np.log(probabilities), [1]).tolist() == [True, False, False, True]
    assert parity.stop_places(np.log(spread), [2]).tolist() == [False]
