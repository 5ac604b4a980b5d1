"""What a stage sees of the world: its inputs as local files, a place to work, and ways to say how it goes."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.pipeline import find
from finetune_api.stage import File, Manifest, StageRun
from finetune_api.types import BASE, DERIVED_STAGES, FineTuneJobSpec, Stage
from finetune_jobs.data.rows import Row
from finetune_jobs.run.digest import data_set
from finetune_jobs.run.errors import InputMissingError
from finetune_jobs.run.preemption import Stop
from finetune_jobs.run.progress import Progress
from finetune_jobs.store import adapters
from finetune_jobs.store.checkpoints import Checkpoints
from finetune_jobs.store.client import Store
from finetune_jobs.store.transfer import download_files


@dataclass(frozen=True)
class Outcome:
    """What a stage made. Everything below ``directory`` is committed."""

    directory: Path
    outputs: dict[str, str]
    """Logical name to the file or folder that holds it, relative to ``directory``: what later stages depend on."""
    artifacts: dict[str, str] = field(default_factory=dict)
    """Name, as users pull it, to a file."""
    figures: dict[str, float | int | str] = field(default_factory=dict)
    """A handful of key figures for status."""


@dataclass(frozen=True)
class Context:
    """One attempt of a stage."""

    run: StageRun
    store: Store
    workspace: Path
    """Scratch, empty at the start, removed by whoever started the stage."""
    cache: Path | None
    """Files by sha256, shared by the stages of this machine."""
    progress: Progress
    stop: Stop
    manifests: dict[str, Manifest]
    """Of the stages that this one reads."""
    checkpoints: Checkpoints
    """Of this stage with these inputs, also those of earlier attempts."""

    @property
    def spec(self) -> FineTuneJobSpec:
        """The whole job's."""
        return self.run.spec

    @property
    def stage(self) -> Stage | None:
        """This stage's entry in the pipeline; None for a derived one."""
        return None if self.run.stage in DERIVED_STAGES else find(self.spec, self.run.stage)

    def fetch(self, stage: str, path: str = "") -> Path:
        """A verified local copy of what that stage committed at ``path`` (a file, a folder, or all of it)."""
        return self._fetch(stage, path, self.workspace / "inputs" / stage)

    def _fetch(self, stage: str, path: str, into: Path) -> Path:
        wanted = [f for f in self._files(stage) if not path or f.path == path or f.path.startswith(f"{path}/")]
        if not wanted:
            raise InputMissingError(f"stage {stage} left nothing at {path!r}; delete its result and run the job again")
        download_files(self.store, wanted, into, cache=self.cache)
        return into / path

    def _files(self, stage: str) -> list[File]:
        return self._manifest(stage).files

    def _manifest(self, stage: str) -> Manifest:
        if stage not in self.manifests:
            raise InputMissingError(f"stage {self.run.stage} reads {stage}, but was not given its result")
        return self.manifests[stage]

    def model_dir(self, weights: str) -> Path:
        """The 16-bit model of ``base`` or of a stage as a Hugging Face directory, tokenizer included."""
        if weights != BASE:
            return self.fetch(weights, "model")
        from finetune_jobs import models  # pulls in the hub client, which few stages need

        record = json.loads(self.fetch("prepare", "base.json").read_text())
        if "model" in self._manifest("prepare").outputs:
            return self.fetch("prepare", "model")
        return models.fetch(record, self.workspace / "inputs" / "base", self.spec.storage)

    def adapter_dir(self, stage: str) -> Path:
        """That stage's adapter, as PEFT writes it."""
        return self.fetch(stage, "adapter")

    def trained_adapter(self, stage: str, wanted: adapters.Wanted, field: str) -> tuple[Path, int | None]:
        """That stage's adapter, or one of its checkpoints', and then the step. ``field`` is for messages."""
        found = adapters.of_stage(self.store, self._manifest(stage), wanted, field)
        into = self.workspace / "inputs" / (stage if found.step is None else f"{stage}-step-{found.step}")
        download_files(self.store, found.files, into, cache=self.cache)
        return into / adapters.FOLDER, found.step

    def rows(self, role: str, of: str | None = None) -> list[Row]:
        """The frozen rows of a role, in order; none if the job has none. ``of``: as that stage would see them."""
        shared = role in ("general", "refusals")
        path = f"data/{role}.jsonl" if shared else f"data/{data_set(self.spec, of or self.run.stage)}/{role}.jsonl"
        if not any(f.path == path for f in self._files("prepare")):
            return []
        with self.fetch("prepare", path).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
