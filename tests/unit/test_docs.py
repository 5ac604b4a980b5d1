import re
from pathlib import Path

import pytest

from finetune_api.status import Reason

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("charts/**/*.md"), *ROOT.glob("images/*.md")]
)
OF_CONDITIONS = {
    Reason.VALID,
    Reason.RUNNING,
    Reason.SUSPENDED,
    Reason.RESUMED,
    Reason.COMPLETED,
    Reason.STAGE_FAILED,
    Reason.SIBLING_FAILED,
    Reason.GATES_PASSED,
    Reason.GATES_FAILED,
    Reason.RETRIES_EXHAUSTED,
}
"""These say what is seen anyway."""


def test_every_reason_can_be_looked_up() -> None:
    """What may stand beside a stage, or refuse a job, is on the page of troubles."""
    page = (ROOT / "docs/cluster/troubleshooting.md").read_text()
    assert [reason for reason in Reason if reason not in OF_CONDITIONS and reason not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page names a file that is there."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
