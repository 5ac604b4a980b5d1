"""Whether the API server serves a FineTuneJob that knows all that we write: an older one drops what it lacks."""

from finetune_api.crd import lacks
from finetune_operator.kube.client import Client, Resource
from finetune_operator.kube.errors import ForbiddenError

DEFINITIONS = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", namespaced=False)
NAME = "finetunejobs.finetune.dev"
_OPENAPI = "/openapi/v3/apis/finetune.dev/v1alpha1"
_SCHEMA = "dev.finetune.v1alpha1.FineTuneJob"


async def missing(client: Client) -> list[str]:
    """Paths of fields that the served schema lacks; empty if it is as new as ours, or newer.

    Reads the definition, or, where we have no right to that, the server's OpenAPI document, which everybody may read.
    Raises NotFoundError if FineTuneJobs are not served at all.
    """
    try:
        return lacks(await client.get(DEFINITIONS, None, NAME))
    except ForbiddenError:
        document = await client.transport.request("GET", _OPENAPI)
        version = {"name": "v1alpha1", "schema": {"openAPIV3Schema": document["components"]["schemas"][_SCHEMA]}}
        found = lacks({"metadata": {}, "spec": {"versions": [version]}})
        return [path for path in found if not path.startswith("metadata")]  # written there as a reference
