import re
from pathlib import Path

import pytest

from finetune_api.status import Reason

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("charts/**/*.md"), *ROOT.glob("images/*.md")]
)
TROUBLES = (ROOT / "docs/cluster/troubleshooting.md").read_text()


def test_every_reason_can_be_looked_up() -> None:
    """What may stand beside a stage or a condition is on the page of troubles, as a word of its own."""
    assert [reason for reason in Reason if not re.search(rf"\b{reason}\b", TROUBLES)] == []


def test_every_reason_on_the_page_is_one() -> None:
    """What its tables explain the code can say: none of an earlier release is left."""
    columns = re.findall(r"^\| (`.*?) \|(?: (`.*?) \|)?", TROUBLES, re.MULTILINE)
    words = {word for row in columns for word in re.findall(r"`([A-Z][A-Za-z]+)`", " ".join(row))}
    conditions = {"Accepted", "Suspended", "Complete", "GatePassed", "Failed"}
    assert len(words) > 25
    assert words - conditions - set(Reason) == set()


def test_every_reason_is_said_somewhere() -> None:
    """A reason that no code sets any more is no reason."""
    code = "".join(path.read_text() for path in ROOT.glob("operator/finetune_operator/**/*.py"))
    assert [reason for reason in Reason if f"Reason.{reason.name}" not in code] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page names a file that is there."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
