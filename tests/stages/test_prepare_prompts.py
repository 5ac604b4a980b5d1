"""What ``prepare`` makes of the role ``prompts``."""

from typing import Any

import pytest
from tests.stages.test_prepare import Job, chat, chats, job, model, pairs, store  # noqa: F401 - fixtures

from finetune_jobs.run.errors import ConfigurationError, DataError


def rl(*rewards: dict[str, Any], **block: Any) -> dict[str, Any]:
    """A stage that is rewarded by these, by length without any."""
    return {"name": "rl", "rl": {"rewards": list(rewards) or [{"builtin": "length"}], **block}}


JUDGE = {"name": "judge", "from": "base", "reward": {}}
EXACT = {"builtin": "exactMatch"}
SKIPPED = {"evaluation": {"skip": True}}


def test_prompts_are_frozen_without_their_answers(job: Job) -> None:  # noqa: F811
    """A row's own answer becomes its reference; some are held out, and no locked test row's question is left."""
    train, asked = chats(60), chats(40, 30)
    data = {"train": job.write("train.jsonl", train), "prompts": job.write("prompts.jsonl", asked)}
    data["preference"] = job.write("pairs.jsonl", pairs(chats(20, 500)))
    done = job.run(job.spec(data, JUDGE, rl({"stage": "judge"}, EXACT)))
    frozen, held_out = done.rows("prompts"), done.rows("promptsEval")
    assert all(row["messages"][-1]["role"] == "user" for row in frozen + held_out)
    answers = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in asked}
    assert all(row["reference"] == answers[row["messages"][0]["content"]] for row in frozen + held_out)
    locked = {row["messages"][0]["content"] for row in done.rows("test")}
    assert locked
    assert not locked & {row["messages"][0]["content"] for row in frozen + held_out}
    removed = done.card["sets"]["default"]["prompts"]["removed"]
    assert len(frozen) + len(held_out) + sum(removed.values()) == 40
    assert len(held_out) == 2
    stage = done.card["stages"]["rl"]
    assert stage["roles"]["prompts"]["rows"] == len(frozen)
    assert stage["longest"] == 128 + max(n["max"] for r in ("prompts", "promptsEval") for n in [tokens(done, r)])
    assert done.card["stages"]["judge"]["roles"]["preference"]["rows"] > 0
    assert {"judge", "rl"} <= done.json("checks")["estimate"]["stages"].keys()


def tokens(done: Any, role: str) -> dict[str, Any]:
    """The card's summary of a role's lengths."""
    found: dict[str, Any] = done.card["sets"]["default"][role]["tokens"]
    return found


@pytest.mark.parametrize(
    ("row", "content", "reference"),
    [
        ({"prompt": "Why?"}, {"messages": [{"role": "user", "content": "Why?"}]}, None),
        ({"prompt": "Why?", "reference": "So."}, {"messages": [{"role": "user", "content": "Why?"}]}, "So."),
        (
            {"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]},
            {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]},
            None,
        ),
        (
            {"instruction": "Say it", "output": "it"},
            {"messages": [{"role": "user", "content": "Say it"}]},
            "it",
        ),
        (
            {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
            {"messages": [{"role": "user", "content": "Why?"}]},
            None,
        ),
    ],
)
def test_every_kind_of_row_can_ask(job: Job, row: dict[str, Any], content: Any, reference: str | None) -> None:  # noqa: F811
    """Whatever columns the question stands in; the answer is kept where there is one."""
    (frozen,) = job.run(job.spec({"prompts": job.write("p.jsonl", [row])}, rl(), **SKIPPED)).rows("prompts")
    assert {key: frozen[key] for key in content} == content
    assert frozen.get("reference") == reference


def test_prompts_take_the_form_of_the_training_rows(job: Job) -> None:  # noqa: F811
    """Beside plain texts a prompt is a text to go on from."""
    train = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(30)]
    data = {"train": job.write("t.jsonl", train), "prompts": job.write("p.jsonl", [{"prompt": "77 + 1 ="}])}
    (frozen,) = job.run(job.spec(data, {"name": "sft", "sft": {}}, rl())).rows("prompts")
    assert frozen["prompt"] == "77 + 1 ="


def test_prompts_alone_are_tested_on_their_references(job: Job) -> None:  # noqa: F811
    """A few are locked with their answer; without any answer there is nothing to score by, which skipping allows."""
    data = {"prompts": job.write("p.jsonl", chats(50))}
    done = job.run(job.spec(data, rl(EXACT)))
    assert [row["messages"][-1]["role"] for row in done.rows("test")] == ["assistant"] * 10
    bare = {"prompts": job.write("bare.jsonl", [{"prompt": f"Question {n}?"} for n in range(9)])}
    with pytest.raises(DataError, match=r"spec.data.prompts: no reference.*spec.data.test"):
        job.run(job.spec(bare, rl()))
    assert job.run(job.spec(bare, rl(), **SKIPPED)).rows("test") == []


def test_a_reference_that_is_missing_is_told_before_training(job: Job) -> None:  # noqa: F811
    """With the reward that needs it, the file and the line."""
    rows = [chat("One?", "1"), chat("Two?", "2"), {"messages": [{"role": "user", "content": "Three?"}]}]
    with pytest.raises(
        DataError, match=r"spec.pipeline\[0\].rl.rewards\[0\]: exactMatch .* 1 prompts lack .*p.jsonl:3"
    ):
        job.run(job.spec({"prompts": job.write("p.jsonl", rows)}, rl(EXACT), **SKIPPED))


def test_prompts_that_leave_no_room_for_an_answer_are_told(job: Job) -> None:  # noqa: F811
    """Those that do not fit are counted; if none does, the field and what the answer takes are named."""
    rows = [*chats(5), chat("word " * 300, "long")]
    data = {"prompts": job.write("p.jsonl", rows)}
    done = job.run(job.spec(data, rl(training={"maxLength": 256}), **SKIPPED))
    used = done.card["stages"]["rl"]["roles"]
    assert sum(role["rows"] for role in used.values()) == 5
    assert sum(sum(role["dropped"].values()) for role in used.values()) == 1
    with pytest.raises(DataError, match=r"rl.training.maxLength: .* 140 tokens, 128 of them for the answer"):
        job.run(job.spec(data, rl(training={"maxLength": 140}), **SKIPPED))


def test_no_prompts_at_all(job: Job) -> None:  # noqa: F811
    """The stage that learns from them is named."""
    with pytest.raises(ConfigurationError, match=r"spec.data.prompts: stage rl learns from these rows"):
        job.run(job.spec({"train": job.write("t.jsonl", chats(30))}, rl()))
