"""FineTuneJobs on a control plane of the tests."""

import json
import time
from typing import Any

from tests.cluster.controlplane import SECONDS, ControlPlane

from finetune_api import crd


def serve_finetunejobs(plane: ControlPlane, definition: dict[str, Any] | None = None) -> None:
    """Return once the server serves them, by our definition or by another one.

    Not by ``kubectl wait``, which takes a definition that is too young to have a status for an error.
    """
    words = json.dumps(definition) if definition else crd.PATH.read_text()
    plane.kubectl("apply", "--validate=strict", "-f", "-", stdin=words)
    deadline = time.monotonic() + SECONDS
    while True:
        served = json.loads(plane.kubectl("get", "crd", f"{crd.PLURAL}.finetune.dev", "-o", "json"))
        conditions = served.get("status", {}).get("conditions") or []
        if any(c["type"] == "Established" and c["status"] == "True" for c in conditions):
            return
        assert time.monotonic() < deadline, "the definition is not established"
        time.sleep(0.1)
