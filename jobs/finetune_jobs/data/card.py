"""The data card: what went in, what was left out and why, and what is worth knowing before training. JSON and plain
text.
"""

from collections.abc import Callable, Mapping
from typing import Any

from finetune_jobs.data import audit
from finetune_jobs.data.lengths import Lengths
from finetune_jobs.data.sets import Role
from finetune_jobs.data.split import row_key


def role_card(role: Role, lengths: Lengths | None) -> dict[str, Any]:
    """Counts, sources and lengths of one frozen role."""
    rows = role.rows
    card: dict[str, Any] = {
        "rows": len(rows),
        "origin": role.origin,
        "sources": role.facts,
        "removed": role.removed,
        "exactDuplicates": audit.exact_duplicates(rows),
    }
    if turns := audit.roles(rows):
        card["turnsByRole"] = turns
    if labels := audit.labels(rows):
        card["labels"] = labels
    if lengths is not None:
        card["tokens"] = audit.summary(lengths.tokens)
        card["supervisedTokens"] = audit.summary(lengths.supervised)
    return card


def near_duplicates(train: Role, against: Mapping[str, Role], report: Callable[[int], None]) -> dict[str, Any]:
    """Near duplicates within ``train``, and how many rows of the other roles also stand in it, exactly or nearly."""
    rows = train.rows
    index = audit.NearIndex(rows, report)
    card: dict[str, Any] = {"nearDuplicates": index.duplicates}
    if len(index.rows) < len(rows):
        card["nearDuplicatesSoughtIn"] = f"a sample of {len(index.rows)} of {len(rows)} rows"
    for name, other in against.items():
        exact = audit.exact_overlap(rows, other.rows)
        same = {row_key(row) for row in exact}
        near = sum(index.near(row) for row in other.rows if row_key(row) not in same)
        card[f"{name}RowsAlsoHere"] = {"exact": len(exact), "near": near}
    return card


def as_text(card: Mapping[str, Any]) -> str:
    """The same for reading in a terminal."""
    lines = ["DATA CARD", ""]
    if card["warnings"]:
        lines += ["Warnings", *(f"  - {w}" for w in card["warnings"]), ""]
    for name, roles in card["sets"].items():
        lines.append(f"Set {name}")
        for role, facts in roles.items():
            lines += _role_text(role, facts)
        lines.append("")
    for role in ("general", "refusals"):
        lines += _role_text(role, card[role])
    lines += ["", "Stages"]
    for name, stage in card["stages"].items():
        lines.append(f"  {name}: set {stage['set']}, maxLength {stage['maxLength']}, overlong {stage['overlong']}")
        for role, used in stage["roles"].items():
            lost = [f"{n} x {reason}" for reason, n in used["dropped"].items()]
            lost += [f"{used['cut']} cut"] if used["cut"] else []
            lines.append(
                f"    {role}: {used['rows']} rows, {used['tokens']} tokens, {used['supervisedTokens']} supervised"
                + (f"; {', '.join(lost)}" if lost else "")
            )
    return "\n".join(lines) + "\n"


def _role_text(role: str, facts: Mapping[str, Any]) -> list[str]:
    lines = [f"  {role}: {facts['rows']} rows ({facts['origin']}), {facts['exactDuplicates']} exact duplicates"]
    if "nearDuplicates" in facts:
        where = f" in {facts['nearDuplicatesSoughtIn']}" if "nearDuplicatesSoughtIn" in facts else ""
        lines[0] += f", {facts['nearDuplicates']} near duplicates{where}"
    if labels := facts.get("labels"):
        share = 100 * labels["desirable"] / (labels["desirable"] + labels["undesirable"])
        lines.append(
            f"    {labels['desirable']} answers desirable ({share:.0f} %), {labels['undesirable']} not; "
            f"{labels['contradictions']} labelled both ways"
        )
    for key in ("testRowsAlsoHere", "evalRowsAlsoHere"):
        if key in facts:
            found = facts[key]
            lines.append(
                f"    {key.removesuffix('RowsAlsoHere')} rows also here: {found['exact']} exactly, {found['near']} "
                "nearly"
            )
    for source in facts["sources"]:
        revision = f" at {source['revision']}" if "revision" in source else ""
        lines.append(
            f"    from {source['source']}{revision}: read {source['read']}, kept {source['kept']}, weight "
            f"{source['weight']:g}"
        )
        lines += [f"      left out {n} x {reason}" for reason, n in source["dropped"].items()]
        lines += [f"      {f['name']}  {f['sizeBytes']} bytes  sha256 {f['sha256']}" for f in source.get("files", [])]
    lines += [f"    left out {n} x {reason}" for reason, n in facts["removed"].items()]
    for key, words in (("tokens", "tokens a row"), ("supervisedTokens", "supervised a row")):
        if found := facts.get(key):
            lines.append(
                f"    {words}: {found['min']} to {found['max']}, mean {found['mean']}, median {found['p50']}, 99 % up "
                f"to {found['p99']}"
            )
    return lines


def warnings(sets: Mapping[str, Mapping[str, Role]], cards: Mapping[str, Any], template: str) -> list[str]:
    """What deserves a look, in words."""
    found: list[str] = []
    for name, roles in sets.items():
        for role, content in roles.items():
            for marker, count in audit.foreign_markers(content.rows, template).items():
                found.append(
                    f"{name}/{role}: {count} plain text rows carry {marker!r}, which this model's chat template does "
                    "not know: it would be "
                    "learned as ordinary text; use messages rows"
                )
            card = cards[name][role]
            for other in ("test", "eval"):
                overlap = card.get(f"{other}RowsAlsoHere", {})
                if overlap.get("exact"):
                    found.append(
                        f"{name}/{role}: {overlap['exact']} {other} rows also stand in it; their scores say little"
                    )
                if overlap.get("near"):
                    found.append(f"{name}/{role}: {overlap['near']} {other} rows nearly stand in it too")
            if contradictions := card.get("labels", {}).get("contradictions"):
                found.append(f"{name}/{role}: {contradictions} answers are labelled desirable and undesirable alike")
            if card["exactDuplicates"] > 0.1 * card["rows"] and role in ("train", "preference"):
                found.append(
                    f"{name}/{role}: {card['exactDuplicates']} of {card['rows']} rows repeat another (a weight above "
                    "1 does that)"
                )
        if "test" in roles and len(roles["test"].rows) < 20:
            found.append(f"{name}/test: only {len(roles['test'].rows)} test rows; scores on them are rough")
    return found
