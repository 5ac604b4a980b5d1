"""A tiny model, a tiny data set, and jobs over them whose ``prepare`` is already committed to a real store."""

import json
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.store.conftest import BUCKET, EmbeddedStore
from tests.tinymodel import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_api.stage import JobRef, Manifest, StageRun, Termination
from finetune_api.types import FineTuneJobSpec
from finetune_jobs.run import lifecycle
from finetune_jobs.run.preemption import Stop
from finetune_jobs.store import layout, manifest
from finetune_jobs.store.client import Store
from finetune_jobs.store.transfer import download_files

Row = dict[str, Any]


def write_model(directory: Path, *, tied: bool = True, hidden_size: int = 64, intermediate_size: int = 128) -> Path:
    """A random Llama of 2 layers that reads bytes, with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(str(directory))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=352,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,  # with the usual 0.02 and a frozen head nothing could be learned in a few steps
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def chat_rows(count: int, seed: int = 0) -> list[Row]:
    """Questions with answers of different lengths, each a function of its question."""
    rng = random.Random(seed)
    rows = []
    for line in range(count):
        word = "".join(rng.choice("abcdef") for _ in range(rng.randint(2, 9)))
        messages = [
            {"role": "user", "content": f"Say {word}"},
            {"role": "assistant", "content": word * rng.randint(1, 3)},
        ]
        rows.append({"id": f"r{seed}-{line}", "source": "train.jsonl", "line": line + 1, "messages": messages})
    return rows


def pair_rows(count: int, seed: int = 0) -> list[Row]:
    """The same questions with a right and a wrong answer."""
    rows = []
    for row in chat_rows(count, seed):
        asked, answer = row.pop("messages")
        wrong = {"role": "assistant", "content": answer["content"][::-1] + "no"}
        rows.append({**row, "prompt": [asked], "chosen": [answer], "rejected": [wrong]})
    return rows


def label_rows(count: int, seed: int = 0) -> list[Row]:
    """Answers to the same questions, each right or wrong, and labelled so."""
    rows = []
    for number, row in enumerate(pair_rows(count, seed)):
        good = number % 3 != 1
        answer = row["chosen" if good else "rejected"]
        rows.append(
            {**{k: row[k] for k in ("id", "source", "line")}, "messages": [*row["prompt"], *answer], "label": good}
        )
    return rows


class Job:
    """A job in a prefix of its own. Stages run in this process, or by whoever is given ``write``'s file."""

    def __init__(
        self, server: EmbeddedStore, scratch: Path, model: Path, roles: Mapping[str, Sequence[Row]], **spec: Any
    ):
        self.scratch = scratch
        self.spec = FineTuneJobSpec.model_validate_json(
            json.dumps(
                {
                    "model": {"source": "file:///tiny"},
                    "data": {"train": [{"source": "file:///train.jsonl"}]},
                    "storage": {
                        "bucket": BUCKET,
                        "endpoint": server.endpoint,
                        "prefix": f"test-{uuid.uuid4().hex[:8]}",
                    },
                    "evaluation": {"skip": True},
                    **spec,
                }
            )
        )
        self.ref = JobRef(namespace="default", name="tiny", uid="u")
        self.store = Store.of(self.spec.storage)
        self.inputs = {"prepare": self._commit_prepare(model, roles)}

    def _commit_prepare(self, model: Path, roles: Mapping[str, Sequence[Row]]) -> str:
        directory = self.scratch / f"prepared-{uuid.uuid4().hex[:8]}"
        (directory / "data/default").mkdir(parents=True)
        (directory / "base.json").write_text("{}")
        for role, rows in roles.items():
            (directory / f"data/default/{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        digest = uuid.uuid4().hex * 2
        prefix = layout.result_prefix(self.store.prefix, self.ref, "prepare", digest)
        paths = {"base.json": directory / "base.json"}
        paths |= {f"model/{p.name}": p for p in sorted(model.iterdir())}
        paths |= {f"data/default/{role}.jsonl": directory / f"data/default/{role}.jsonl" for role in roles}
        files = [
            self.store.put_file(path, f"{prefix}/artifacts/w/{name}", name=name).model_copy(update={"path": name})
            for name, path in paths.items()
        ]
        outputs = {name: manifest.content_digest(files, under=name) for name in ("base.json", "model")}
        outputs = {"base": outputs["base.json"], "model": outputs["model"]}
        outputs |= {f"data/default/{r}": manifest.content_digest(files, under=f"data/default/{r}.jsonl") for r in roles}
        committed = Manifest(
            job=self.ref, stage="prepare", attempt=1, digest=digest, inputs={}, outputs=outputs, files=files,
            artifacts=[], figures={}, started="", finished="",
        )  # fmt: skip
        manifest.commit(self.store, committed)
        return layout.manifest_key(prefix)

    def stage_run(self, stage: str) -> StageRun:
        """What the next attempt of the stage is given."""
        return StageRun(job=self.ref, stage=stage, attempt=1, spec=self.spec, inputs=self.inputs)

    def run(self, stage: str, stop: Stop | None = None, workspace: Path | None = None) -> Manifest:
        """One attempt in this process; its result is an input of the later stages."""
        given = {"FINETUNE_WORKSPACE": str(workspace)} if workspace else {}
        message = lifecycle.execute(self.stage_run(stage), stop or Stop(), given)
        return self.committed(stage, message)

    def committed(self, stage: str, message: Termination) -> Manifest:
        """The result that a termination message names."""
        assert message.result is not None
        self.inputs[stage] = message.result.manifest
        return manifest.load(self.store, message.result.manifest)

    def files(self, result: Manifest) -> Path:
        """A local copy of a result's files."""
        into = self.scratch / f"{result.stage}-{uuid.uuid4().hex[:8]}"
        download_files(self.store, result.files, into)
        return into

    def log(self, result: Manifest) -> dict[str, Any]:
        """``training.json`` of a result."""
        content: dict[str, Any] = json.loads((self.files(result) / "training.json").read_text())
        return content

    def write(self, stage: str) -> Path:
        """``stage.json`` for a process."""
        path = self.scratch / f"{stage}-stage.json"
        path.write_text(self.stage_run(stage).model_dump_json(by_alias=True, exclude_unset=True))
        return path


class StopAfter(Stop):
    """Told to stop at the ``n``-th time that the loop asks: in a step, after it, in an evaluation."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self._left = n

    @property
    def requested(self) -> bool:
        """Counts down."""
        self._left -= 1
        if self._left <= 0:
            self.request()
        return super().requested

    def check(self) -> None:
        """Raises once told."""
        if self._requested:
            super().check()


def answer_log_prob(model: Any, tokenizer: Any, prompt: list[Row], answer: str) -> tuple[float, int]:
    """By other means than ours: the log-probability of an answer with its stop token, and its number of tokens."""
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    after = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0].double()
    log_probs = logits.log_softmax(-1)
    return sum(float(log_probs[len(before) + i - 1, token]) for i, token in enumerate(after)), len(after)


def sha256(result: Manifest, path: str) -> str:
    """Of one file of a result."""
    return next(file.sha256 for file in result.files if file.path == path)


JobMaker = Callable[..., Job]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, made once."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def make_job(
    store_server: EmbeddedStore,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[JobMaker]:
    """Makes jobs: ``make_job({"train": rows}, pipeline=[...])``."""
    for name, value in {**store_server.environment(), "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def make(roles: Mapping[str, Sequence[Row]], *, model: Path = tiny_model, **spec: Any) -> Job:
        return Job(store_server, tmp_path, model, roles, **spec)

    yield make
    torch.set_num_threads(threads)


def environment(**more: str) -> dict[str, str]:
    """For stages as processes of their own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **more}


def wait_for(ready: Callable[[], bool], seconds: float = 120) -> None:
    """Until it is true."""
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
