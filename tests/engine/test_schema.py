import asyncio
import json

import pytest
import yaml
from tests.cluster.controlplane import ControlPlane
from tests.cluster.definitions import serve_finetunejobs

from finetune_api import crd
from finetune_operator.kube import Client
from finetune_operator.schema import missing

ROLE = """
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: reads-definitions}
rules:
- {apiGroups: [apiextensions.k8s.io], resources: [customresourcedefinitions], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: reads-definitions}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reads-definitions}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: reader}]
"""


@pytest.mark.parametrize("user", ["reader", "stranger"], ids=["may read it", "may not read it"])
def test_a_served_schema_that_is_older_is_seen(control_plane: ControlPlane, user: str) -> None:
    """By its definition, or by the API's own description where the definition may not be read."""
    control_plane.kubectl("apply", "-f", "-", stdin=ROLE)

    async def seen(wanted: list[str]) -> list[str]:
        """What is missing; asked until it is what is wanted, since the description follows a little later."""
        async with await Client.connect(control_plane.kubeconfig_for(user)) as client:
            for _ in range(300):
                found = await missing(client)
                if found == wanted:
                    break
                await asyncio.sleep(0.2)
            return found

    own = yaml.safe_load(crd.PATH.read_text())
    older = json.loads(json.dumps(own))
    del older["metadata"]["annotations"]
    status = older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    del status["reportURI"]
    try:
        serve_finetunejobs(control_plane, older)
        assert asyncio.run(seen(["status.reportURI"])) == ["status.reportURI"]
    finally:
        serve_finetunejobs(control_plane)
    assert asyncio.run(seen([])) == []
