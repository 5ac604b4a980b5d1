"""From sources to frozen sets: what is trained on, what is watched, what is locked away for the test.

The test rows are locked once for the whole job, before any other choice. Where we set them aside ourselves, nothing
that asks the same question stays in any training set; where the user gave them, an overlap is only counted.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.pipeline import data_of
from finetune_api.types import Data, DataSource, FineTuneJobSpec
from finetune_jobs.data import split
from finetune_jobs.data.cells import check_names
from finetune_jobs.data.load import Mistakes, RoleRows, load_role
from finetune_jobs.data.pairs import sft_on_chosen
from finetune_jobs.data.prompts import answered
from finetune_jobs.data.rows import Row
from finetune_jobs.data.sources import Opened, Part, open_source
from finetune_jobs.run.errors import ConfigurationError, DataError

DEFAULT = "default"
BUILTIN = Path(__file__).parent / "builtin"
SHARED = ("general", "refusals")
"""Roles that are the same for the whole job."""
SAME_QUESTION = "asks what a locked test row asks"


@dataclass
class Role:
    """The rows of a role on their way to being frozen."""

    sources: list[tuple[float, list[Row]]] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    origin: str = "given"
    removed: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """Each row once, in order."""
        return [row for _, rows in self.sources for row in rows]

    def keep(self, kept: Iterable[Row]) -> None:
        """Leave out all other rows."""
        ids = {row["id"] for row in kept}
        self.sources = [(weight, [row for row in rows if row["id"] in ids]) for weight, rows in self.sources]


@dataclass
class Sets:
    """All data of a job."""

    sets: dict[str, dict[str, Role]]
    """Set name (``default`` or a stage's) to role to rows; only roles that have rows."""
    shared: dict[str, Role]


class Builder:
    """Reads sources once, however many sets use them."""

    def __init__(
        self, spec: FineTuneJobSpec, directory: Path, *, chat: bool, mistakes: Mistakes, report: Callable[[int], None]
    ) -> None:
        """``directory`` is scratch for downloads; ``chat``: the tokenizer has a chat template."""
        self._spec, self._directory, self._chat = spec, directory, chat
        self._mistakes, self._report = mistakes, report
        self._opened: dict[tuple[str, str], Opened] = {}

    def build(self) -> Sets:
        """Every set, split and mixed. DataError with all mistakes found; ConfigurationError for what the spec asks in
        vain.
        """
        sets = {DEFAULT: self._read(self._spec.data, None)}
        for number, stage in enumerate(self._spec.pipeline):
            for role in ("test", *SHARED):
                if getattr(stage.data, role):
                    raise ConfigurationError(
                        f"spec.pipeline[{number}].data.{role}: these rows are the same for the whole job; write them "
                        f"under spec.data.{role}"
                    )
            if (data := data_of(self._spec, stage.name)) != self._spec.data:
                sets[stage.name] = self._read(data, number)
        shared = {role: self._shared(role) for role in SHARED}
        self._mistakes.refuse()
        self._lock_test(sets, shared["general"])
        for roles in sets.values():
            self._split(roles, "train", "eval")
            self._split(roles, "preference", "preferenceEval")
            self._split(roles, "prompts", "promptsEval")
        for name, roles in sets.items():
            if name != DEFAULT:
                roles.pop("test", None)
        return Sets(sets, shared)

    def _read(self, data: Data, stage: int | None) -> dict[str, Role]:
        roles = {role: self._role(role, data, stage, chat_pairs=self._chat) for role in ("train", "eval", "test")}
        # Pairs of plain texts take the form of the rows that the model learns from before it sees them.
        plain = any("text" in row or "prompt" in row for row in roles["train"].rows)
        for role in ("preference", "prompts"):
            roles[role] = self._role(role, data, stage, chat_pairs=self._chat and not plain)
        return {name: role for name, role in roles.items() if role.facts}

    def _role(self, role: str, data: Data, stage: int | None, *, chat_pairs: bool) -> Role:
        sources: list[DataSource] = getattr(data, role)
        own = stage is not None and getattr(self._spec.pipeline[stage].data, role)
        field_path = f"spec.pipeline[{stage}].data.{role}" if own else f"spec.data.{role}"
        for i, source in enumerate(sources):
            check_names(source.columns, f"{field_path}[{i}]")
        opened = [(s, f"{field_path}[{i}]", self._open(s, f"{field_path}[{i}]")) for i, s in enumerate(sources)]
        return _as_role(
            load_role(
                role, opened, chat=self._chat, chat_pairs=chat_pairs, mistakes=self._mistakes, report=self._report
            )
        )

    def _open(self, source: DataSource, where: str) -> Opened:
        key = (source.source, source.split)
        if key not in self._opened:
            place = self._directory / str(len(self._opened))
            self._opened[key] = open_source(source, self._spec.storage, where, place)
        return self._opened[key]

    def _shared(self, role: str) -> Role:
        if getattr(self._spec.data, role):
            return self._role(role, self._spec.data, None, chat_pairs=self._chat)
        source = DataSource(source=f"builtin/{role}.jsonl")
        content = Opened([Part(f"{role}.jsonl", BUILTIN / f"{role}.jsonl")], {"source": "built in"})
        loaded = load_role(
            role,
            [(source, role, content)],
            chat=self._chat,
            chat_pairs=False,
            mistakes=self._mistakes,
            report=self._report,
        )
        found = _as_role(loaded)
        found.origin = "built in"
        return found

    def _lock_test(self, sets: dict[str, dict[str, Role]], general: Role) -> None:
        if "test" in sets[DEFAULT]:
            return
        kinds = ("train", "preference", "prompts")
        role, pool = next(((r, roles[r]) for r in kinds for roles in sets.values() if r in roles), ("", None))
        if pool is None and self._spec.evaluation.skip:  # nothing trains: a model is only converted, and held against
            rows = [_answered(row) for row in general.rows]
            sets[DEFAULT]["test"] = Role([(1.0, rows)], [], f"the rows of general, {general.origin}")
            return
        if pool is None:
            raise ConfigurationError("spec.data: no rows at all; give train, preference or prompts")
        if role == "prompts" and self._spec.evaluation.skip:
            return
        # An answer that is labelled undesirable is none to compare with, nor is none at all.
        rows = [row for row in pool.rows if (row.get("label", True) if role != "prompts" else "reference" in row)]
        if not rows:
            lack = "reference" if role == "prompts" else "desirable answer"
            raise DataError(f"spec.data.{role}: no {lack}, so there is no test row; give spec.data.test")
        test, left = split.take(rows, split.locked_size(len(rows)), self._spec.seed, "test")
        if not test:
            one = "there is one row only" if len(rows) == 1 else f"all {len(rows)} rows are equal"
            raise DataError(
                f"{rows[0]['source']}: no test row can be set aside, since {one}; add rows, or give spec.data.test"
            )
        if copies := len(rows) - len(test) - len(left):
            pool.removed["copy of a locked test row"] = copies
        apart = {row["id"] for row in rows}
        pool.keep([*left, *(row for row in pool.rows if row["id"] not in apart)])
        taken = f"set aside from {rows[0]['source']}" if len(pool.sources) == 1 else "set aside from the training data"
        locked = [_answered(row) for row in test]
        sets[DEFAULT]["test"] = Role([(1.0, locked)], [], taken)
        key = split.row_key if _share(split.question_key, test, left) else split.question_key
        questions = {key(row) for row in test}
        for roles in sets.values():
            for name in ("train", "eval", "preference", "prompts"):
                self._remove(roles.get(name), questions, key, name)

    def _remove(self, role: Role | None, questions: set[str], key: split.Key, name: str) -> None:
        if role is None:
            return
        rows = role.rows
        kept = [row for row in rows if key(row) not in questions]
        if rows and not kept:
            raise DataError(
                f"every row of {name} {SAME_QUESTION}; give other rows, or test rows of your own (spec.data.test)"
            )
        if len(kept) < len(rows):
            role.removed[SAME_QUESTION] = len(rows) - len(kept)
            role.keep(kept)

    def _split(self, roles: dict[str, Role], of: str, into: str) -> None:
        """Set evaluation rows aside if none were given, and lay out what is left as one epoch."""
        if of not in roles:
            return
        pool = roles[of]
        if into not in roles:
            rows = pool.rows
            taken, left = split.take(rows, split.eval_size(len(rows)), self._spec.seed, into)
            if taken:
                roles[into] = Role([(1.0, taken)], [], f"set aside from {of}")
                if copies := len(rows) - len(taken) - len(left):
                    pool.removed["copy of an evaluation row"] = copies
                pool.keep(left)
        if any(weight != 1.0 for weight, _ in pool.sources):
            pool.sources = [(1.0, split.mix(pool.sources, self._spec.seed))]


def _as_role(loaded: RoleRows) -> Role:
    return Role([(s.weight, s.rows) for s in loaded.sources], [s.facts for s in loaded.sources])


def _answered(row: Row) -> Row:
    """A row to score answers by, whatever the training learns from it."""
    if "chosen" in row:
        return _from_pair(row)
    return answered(row) if "reference" in row else _without_label(row)


def _from_pair(pair: Row) -> Row:
    row: Row = {"id": pair["id"], "source": pair["source"], "line": pair["line"]}
    row.update(sft_on_chosen(pair))  # type: ignore[typeddict-item]
    return row


def _without_label(row: Row) -> Row:
    left = row.copy()
    left.pop("label", None)
    return left


def _share(key: split.Key, some: Iterable[Row], others: Iterable[Row]) -> bool:
    return not {key(row) for row in some}.isdisjoint({key(row) for row in others})
