import json

import numpy as np
import pytest
import torch
from tests.stages.finished_run import LORA, FinishedRun, RunMaker
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_jobs.evaluation import metrics
from finetune_jobs.evaluation.answers import read


def test_every_target_answers_the_rows_that_the_base_model_answered(finished: FinishedRun) -> None:
    """Base, merged model and GGUF: the same rows, the same prompts, the base's answers being the baseline's."""
    base = finished.answers("base")
    assert {role: len(rows) for role, rows in base.items()} == {"test": 4, "general": 20, "refusals": 20}
    for target in ("merge", "gguf/Q8_0"):
        answers = finished.answers(target)
        for role, rows in base.items():
            assert [(a.id, a.prompt, a.reference, a.expect) for a in answers[role]] == [
                (a.id, a.prompt, a.reference, a.expect) for a in rows
            ]
            assert all(a.answer is not None for a in answers[role])
    assert read(finished.files("baseline") / "answers") == [a for rows in base.values() for a in rows]


def test_every_score_can_be_computed_again_from_the_answers(finished: FinishedRun) -> None:
    """The figures in scores.json are those of the texts in the JSONL, by the definitions."""
    scores = finished.json("evaluate", "scores.json")["scores"]
    assert list(scores) == ["base", "merge", "gguf/Q8_0"]
    for target, figures in scores.items():
        answers = finished.answers(target)
        for name, score in metrics.TEXT_METRICS.items():
            values = [score(a.answer or "", a.reference or "") for a in answers["test"]]
            assert figures[name] == pytest.approx(sum(values) / len(values))
        right = [metrics.contains_reference(a.answer or "", a.reference or "") for a in answers["general"]]
        assert figures["general"] == sum(right) / 20
        expected = [metrics.refusal_score(a.answer or "", a.expect or "") for a in answers["refusals"]]
        assert figures["refusals"] == sum(expected) / 20
        everyone = [a for rows in answers.values() for a in rows]
        assert figures["generatedTokens"] == sum((a.tokens or 0) + bool(a.finished) for a in everyone)
        assert figures["tokensPerSecond"] * figures["generationSeconds"] == pytest.approx(
            figures["generatedTokens"], rel=1e-2
        )


def test_the_loss_of_the_merged_model_is_what_transformers_says(finished: FinishedRun) -> None:
    """Summed over the tokens of all references, divided by their number."""
    directory = finished.files("merge") / "model"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    total = tokens = 0.0
    for answer in finished.answers("merge")["test"]:
        prompt = tokenizer(answer.prompt, add_special_tokens=False)["input_ids"]
        said = tokenizer(f"{answer.reference}<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
        own = -sum(float(logprobs[len(prompt) + i - 1, token]) for i, token in enumerate(said))
        assert answer.loss == pytest.approx(own / len(said), rel=1e-4)
        total, tokens = total + own, tokens + len(said)
    assert finished.json("evaluate", "scores.json")["scores"]["merge"]["loss"] == pytest.approx(
        total / tokens, rel=1e-4
    )


def test_a_gguf_answers_and_loses_as_llama_cpp_says(finished: FinishedRun) -> None:
    """Each row alone, through llama-cpp-python's own interface: the same text, and the same loss but for rounding."""
    from llama_cpp import Llama

    path = next(finished.files("gguf").glob("*-Q8_0.gguf"))
    llama = Llama(str(path), n_ctx=512, logits_all=True, verbose=False)
    for answer in finished.answers("gguf/Q8_0")["test"]:
        prompt = llama.tokenize(answer.prompt.encode(), add_bos=False, special=True)
        said = llama.tokenize(f"{answer.reference}<|im_end|>".encode(), add_bos=False, special=True)
        llama.reset()
        llama.eval(prompt + said)
        logits = np.array(llama.scores[len(prompt) - 1 : len(prompt) + len(said) - 1], dtype=np.float64)
        logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        own = -np.mean([logprobs[i, token] for i, token in enumerate(said)])
        assert answer.loss == pytest.approx(own, rel=5e-3)
        made: list[int] = []
        llama.reset()
        llama.eval(prompt)
        while len(made) < 12:
            token = int(np.argmax(llama.scores[llama.n_tokens - 1]))
            if token == llama.token_eos():
                break
            made.append(token)
            llama.eval([token])
        assert answer.tokens == len(made)
        assert (answer.answer or "").encode() == llama.detokenize(made, special=False) or "\ufffd" in (
            answer.answer or ""
        )
    llama.close()


def test_the_diffs_show_both_answers_to_every_row(finished: FinishedRun) -> None:
    """One line a row for programs, counts that add up, the same for people as text."""
    out = finished.files("evaluate")
    scores = finished.json("evaluate", "scores.json")["scores"]
    for target in ("merge", "gguf/Q8_0"):
        rows = [json.loads(line) for line in (out / f"diffs/{target}.jsonl").open(encoding="utf-8")]
        assert len(rows) == 44
        counts = {word: sum(row["change"] == word for row in rows) for word in ("better", "worse", "same")}
        assert counts == {word: scores[target][word] for word in counts}
        text = (out / f"diffs/{target}.txt").read_text(encoding="utf-8")
        assert text.startswith(f"base -> {target}: ")
        assert all(f"== {row['role']} {row['id']}: {row['change']}" in text for row in rows)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_that_nothing_merges_is_scored_as_it_is(start_run: RunMaker, method: str) -> None:
    """An adapter is scored on its base, a fully trained model by itself; both differ from the base model."""
    stage = {"name": "sft", "sft": {"method": method, "training": LORA["sft"]["training"]}}  # type: ignore[index]
    run = start_run([stage], evaluation={"maxRows": 2})
    for name in ("prepare", "baseline", "sft", "evaluate"):
        run.run(name)
    scores = run.json("evaluate", "scores.json")["scores"]
    assert list(scores) == ["base", "sft"]
    model = AutoModelForCausalLM.from_pretrained(
        run.files("prepare" if method == "lora" else "sft") / "model", dtype=torch.float32
    ).eval()
    if method == "lora":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, run.files("sft") / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.files("prepare") / "model")
    for answer in run.answers("sft")["test"]:
        prompt = tokenizer(answer.prompt, add_special_tokens=False)["input_ids"]
        said = tokenizer(f"{answer.reference}<|im_end|>", add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + said])
        with torch.no_grad():
            loss = float(model(input_ids=torch.tensor([prompt + said]), labels=labels).loss)
        assert answer.loss == pytest.approx(loss, rel=1e-3)
    assert scores["sft"]["loss"] < scores["base"]["loss"]
