import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.stages.finished_run import LORA, RunMaker
from tests.stages.training_job import chat_rows
from tests.tinymodel import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_jobs.data.encode import Encoded, encode, load_tokenizer, prompt_ids, stop_ids
from finetune_jobs.evaluation.answers import read
from finetune_jobs.evaluation.hf import HFModel
from finetune_jobs.run.errors import ConfigurationError, PreemptedError
from finetune_jobs.run.preemption import Stop


def test_answers_and_losses_are_those_of_transformers_row_by_row(start_run: RunMaker) -> None:
    """Batches change nothing: every answer is transformers' own greedy one, every loss the model's, token by token."""
    run = start_run([LORA], test=chat_rows(40, seed=3), evaluation={"maxRows": 37})
    run.run("prepare")
    result = run.run("baseline")
    prepared, out = run.files("prepare"), run.files("baseline")
    model = AutoModelForCausalLM.from_pretrained(prepared / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(prepared / "model")
    rows = [json.loads(line) for line in (prepared / "data/default/test.jsonl").read_text().splitlines()][:37]
    answers = [a for a in read(out / "answers") if a.role == "test"]
    assert [a.id for a in answers] == [row["id"] for row in rows]
    total = tokens = 0.0
    for row, answer in zip(rows, answers, strict=True):
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        made = model.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=stop_ids(tokenizer), pad_token_id=0,
            attention_mask=torch.ones_like(ids), repetition_penalty=1.0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        finished = made[-1] in stop_ids(tokenizer)
        kept = made[:-1] if finished else made
        assert (answer.prompt, answer.finished, answer.tokens) == (prompt, finished, len(kept))
        assert answer.answer == tokenizer.decode(kept, skip_special_tokens=True)
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False).removesuffix("\n")
        sequence = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        labels = sequence.clone()
        labels[0, : ids.shape[1]] = -100
        with torch.no_grad():
            loss = float(model(sequence, labels=labels).loss)
        assert answer.loss == pytest.approx(loss, rel=1e-4)
        assert answer.loss_tokens == sequence.shape[1] - ids.shape[1]
        total, tokens = total + loss * (answer.loss_tokens or 0), tokens + (answer.loss_tokens or 0)
    scores = json.loads((out / "scores.json").read_text())["scores"]["base"]
    assert scores["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert (scores["testRows"], scores["lossTokens"], scores["generalRows"], scores["refusalsRows"]) == (
        37,
        tokens,
        20,
        20,
    )
    assert result.figures["loss"] == round(scores["loss"], 4)


def test_plain_text_rows_have_a_loss_and_no_answer(start_run: RunMaker) -> None:
    """Nothing can be asked of a text: it is not generated from, and its loss runs over all tokens but the first."""
    texts = [{"text": f"Some words, and a number: {i * 7}."} for i in range(12)]
    run = start_run([LORA], train=texts, test=[{"text": "One more text."}])
    run.run("prepare")
    run.run("baseline")
    out = run.files("baseline")
    (answer,) = [a for a in read(out / "answers") if a.role == "test"]
    tokenizer = load_tokenizer(run.files("prepare") / "model")
    encoded = encode(
        {"id": "", "source": "", "line": 1, "text": "One more text."},
        tokenizer,
        loss_on="auto",
        max_length=99,
        overlong="drop",
    )
    assert isinstance(encoded, Encoded)
    assert (answer.answer, answer.scores, answer.loss_tokens) == (None, {}, len(encoded.input_ids) - 1)
    scores = json.loads((out / "scores.json").read_text())["scores"]["base"]
    assert "exactMatch" not in scores
    assert scores["general"] >= 0


def test_prompts_that_fill_the_context_shorten_nobody_else(start_run: RunMaker) -> None:
    """A prompt near the end of the context gets the room that is left, one beyond it none, the others all of theirs."""
    run = start_run([LORA])
    run.run("prepare")
    directory = run.files("prepare") / "model"
    model = HFModel(directory)
    model.context_length = 60
    short, near, beyond = [5] * 10, [6] * 55, [7] * 60
    alone = model.generate([short], 12, [], lambda done: None)[0]
    answers = model.generate([beyond, short, near], 12, [], lambda done: None)
    assert [len(a.ids) for a in answers] == [0, 12, 5]
    assert answers[1] == alone
    assert not any(a.finished for a in answers)


def test_a_model_that_computes_no_number_has_no_scores(start_run: RunMaker, tmp_path: Path) -> None:
    """NaN would be no JSON, and a mean over it no score: the model is refused in words, and nothing is committed."""
    model = tiny_model(tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    run = start_run([LORA], model=model, evaluation={"maxNewTokens": 1})
    run.run("prepare")
    with pytest.raises(ConfigurationError, match="computes no number for 6 of 6 test rows"):
        run.run("baseline")


def test_it_stops_between_tokens_when_told_to(start_run: RunMaker) -> None:
    """SIGTERM is answered at the next token: PreemptedError, exit 75, and the next attempt starts anew and succeeds."""
    run = start_run([LORA])
    run.run("prepare")
    told = Stop()
    told.request()
    with pytest.raises(PreemptedError):
        run.run("baseline", told)
    model = HFModel(run.files("prepare") / "model")
    calls = 0

    def tick(done: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise PreemptedError("told")

    with pytest.raises(PreemptedError):
        model.generate([[5, 6]] * 4, 50, [], tick)
    assert calls == 3
    assert run.run("baseline").stage == "baseline"


def test_nothing_of_a_generation_config_reaches_the_answers(start_run: RunMaker) -> None:
    """A model that ships sampling and a repetition penalty is still asked for its likeliest tokens."""
    run = start_run([LORA])
    run.run("prepare")
    directory = run.files("prepare") / "model"
    tokenizer = load_tokenizer(directory)
    prompt = prompt_ids(chat_rows(1)[0], tokenizer)  # type: ignore[arg-type]
    plain = HFModel(directory).generate([prompt], 12, [], lambda done: None)
    (directory / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "repetition_penalty": 5.0, "temperature": 9.0})
    )
    assert HFModel(directory).generate([prompt], 12, [], lambda done: None) == plain
