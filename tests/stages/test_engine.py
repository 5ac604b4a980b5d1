from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.stages.gguf_models import random_gguf as random_gguf
from tests.stages.gguf_models import random_model as random_model
from tests.stages.gguf_models import smollm2 as smollm2
from tests.stages.gguf_models import smollm2_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_jobs.gguf import metadata
from finetune_jobs.gguf.convert import convert
from finetune_jobs.gguf.engine import GGUFModel
from finetune_jobs.run.errors import DataError, InputMissingError

PROMPTS = [
    "What is the capital of France?",
    "2+2?",
    "Translate 'hello' to Spanish.",
    "Name three colours.",
    "Is water wet? Answer with yes or no and nothing else, please, since I am in a hurry.",
]


@pytest.fixture(scope="module")
def chat() -> Iterator[GGUFModel]:
    """SmolLM2 as it is published."""
    with GGUFModel(smollm2_gguf()) as model:
        yield model


@pytest.fixture(scope="module")
def exact(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFModel]:
    """The random model in float32: in 16 bits two tokens 0.006 nats apart changed places with the size of the batch."""
    path = tmp_path_factory.mktemp("f32") / "model.gguf"
    convert(random_model, path, name="random", precision="f32")
    with GGUFModel(path, parallel=3) as model:
        yield model


def asked(model: GGUFModel, prompts: list[str]) -> list[list[int]]:
    """As ids, rendered by the model's template."""
    return [model.tokenize(model.render([{"role": "user", "content": prompt}])) for prompt in prompts]


def test_answers_are_sensible_and_end(chat: GGUFModel) -> None:
    """A chat model answers a simple question and ends its answer with the stop token, which is not part of the text."""
    (answer,) = chat.generate(asked(chat, ["Translate 'hello' to Spanish."]), 32)
    assert "hola" in answer.text.lower()
    assert "<|" not in answer.text
    assert answer.finished
    assert answer.stop_id == chat.eos == 2
    assert chat.eos not in answer.ids


def test_neighbours_and_order_change_nothing(exact: GGUFModel) -> None:
    """One by one, in groups, or in another order: the same answers."""
    prompts = asked(exact, PROMPTS)
    together = exact.generate(prompts, 12)
    assert [exact.generate([prompt], 12)[0] for prompt in prompts] == together
    assert exact.generate(prompts[::-1], 12)[::-1] == together
    assert exact.generate(prompts, 12) == together
    assert len({tuple(answer.ids) for answer in together}) > 1


def test_greedy_answers_are_those_of_transformers(exact: GGUFModel, random_model: Path) -> None:
    """The same ids as transformers' greedy search over the same weights in float32."""
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    prompts = asked(exact, PROMPTS)
    wanted = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in exact.end_of_generation:
                break
        wanted.append(ids[len(prompt) :])
    found = exact.generate(prompts, 12)
    assert [a.ids + [a.stop_id] * a.finished for a in found] == wanted


def test_log_probabilities_are_those_of_transformers(exact: GGUFModel, random_model: Path) -> None:
    """For every place of an answer the whole distribution, normalised, as transformers computes it; long rows too."""
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 49152, n).tolist(), rng.integers(0, 49152, m).tolist())
        for n, m in ((5, 3), (1, 9), (400, 100))
    ]
    for (prompt, answer), found in zip(pairs, exact.answer_logprobs(pairs), strict=True):
        assert found.shape == (len(answer), 49152)
        assert found.dtype == np.float32
        assert np.allclose(np.exp(found.astype(float)).sum(-1), 1)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :].double()
        wanted = logits.log_softmax(-1).numpy()
        assert (np.exp(wanted) * (wanted - found)).sum(-1).mean() < 1e-4
        assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.9999


def test_generation_stops_where_it_is_told_to(exact: GGUFModel) -> None:
    """At a given token, at the limit of new tokens, at the end of the context; the answer says which."""
    (prompt,) = asked(exact, PROMPTS[:1])
    (free,) = exact.generate([prompt], 12)
    assert len(free.ids) == 12
    assert not free.finished
    assert free.stop_id is None
    (stopped,) = exact.generate([prompt], 12, stop_ids=[free.ids[4]])
    assert stopped.ids == free.ids[: free.ids.index(free.ids[4])]
    assert stopped.finished
    assert stopped.stop_id == free.ids[4]
    (filled,) = exact.generate([(prompt * 60)[:508]], 12)
    assert len(filled.ids) == 4
    assert not filled.finished


def test_prompts_without_room_get_no_answer(exact: GGUFModel) -> None:
    """An empty prompt and one as long as the context are answered with nothing, the others as ever."""
    (prompt,) = asked(exact, PROMPTS[:1])
    empty, good, full = exact.generate([[], prompt, prompt * 100], 4)
    assert (empty.ids, full.ids, full.finished) == ([], [], False)
    assert good == exact.generate([prompt], 4)[0]


def test_rows_longer_than_the_context_are_refused(exact: GGUFModel) -> None:
    """Probabilities of a pair that does not fit end with the numbers, not with wrong ones."""
    with pytest.raises(DataError, match=r"row 1 has 520 tokens.*takes 512"):
        next(exact.answer_logprobs([([5] * 500, [5] * 20)]))


def test_progress_is_told_and_can_stop_the_work(exact: GGUFModel) -> None:
    """The number of answers done never falls and ends at all of them; an exception from the listener comes through."""
    seen: list[int] = []
    exact.generate(asked(exact, PROMPTS), 3, tick=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(PROMPTS)
    assert len(seen) > len(PROMPTS) / 3

    def stop(done: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        exact.generate(asked(exact, PROMPTS), 3, tick=stop)


def test_prompt_and_ids_are_those_of_transformers(chat: GGUFModel, smollm2: Path) -> None:
    """The template in the file renders, and the vocabulary tokenizes, what transformers does."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = [
        {"role": "user", "content": "Hé 123"},
        {"role": "assistant", "content": "Oui"},
        {"role": "user", "content": "为什么?"},
    ]
    for conversation in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert chat.render(conversation) == text
        assert chat.tokenize(text) == tokenizer(text)["input_ids"]


def test_metadata_is_text_and_tells_of_the_model(chat: GGUFModel) -> None:
    """Single values of the file's head, whatever their length; no beginnings of arrays."""
    head = metadata.read(smollm2_gguf()).fields
    assert chat.metadata["tokenizer.chat_template"] == head["tokenizer.chat_template"]
    assert chat.metadata["llama.context_length"] == "8192"
    assert chat.context_length == 8192
    assert "tokenizer.ggml.tokens" not in chat.metadata


def test_damaged_file_is_refused_with_llama_cpps_words(random_gguf: Path, tmp_path: Path) -> None:
    """A file that is cut short does not load, and the error says so."""
    (tmp_path / "cut.gguf").write_bytes(random_gguf.read_bytes()[:-100_000])
    with pytest.raises(InputMissingError, match=r"cut.gguf.*(bounds|corrupted|incomplete)"):
        GGUFModel(tmp_path / "cut.gguf")
