import copy
import http.client
import json
import re
import ssl
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.badspecs import REFUSED_BY_THE_SERVER, SEEN_BY_PLAN_ONLY, named
from tests.builders import MERGE, NOW, SFT, a_job, after, broken, found, raw_job, running, succeeded
from tests.cluster.controlplane import ControlPlane
from tests.cluster.definitions import serve_finetunejobs

from finetune_api import crd
from finetune_api.stage import Artifact, StageResult
from finetune_api.status import CheckpointStatus, JobStatus, MetricValue, Progress
from finetune_api.validate import parse
from finetune_operator.plan.plan import plan

EXAMPLES = sorted((Path(__file__).parents[2] / "manifests/examples").glob("*.yaml"))
SMALLEST = """
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support-bot}
spec:
  model: {source: hf://meta-llama/Meta-Llama-3-8B-Instruct}
  data:
    train: [{source: s3://datasets/support/train.jsonl}]
  storage: {bucket: finetune, secretRef: {name: s3-credentials}}
  pipeline:
  - {name: sft, sft: {method: qlora}, resources: {gpus: 1}}
  - {name: merge, merge: {}}
  - {name: gguf, quantize: {gguf: [Q4_K_M, Q8_0]}}
"""
"""As the API's own description has it."""
CRD_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune.dev"
MERGE_PATCH = "application/merge-patch+json"


class Server:
    """The real apiserver, with the definition in it."""

    def __init__(self, plane: ControlPlane) -> None:
        self._context = ssl.create_default_context(cafile=plane.authority)
        self._context.load_cert_chain(*plane.client_certificate)
        self._port = plane.port

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> tuple[int, Any]:
        """Status and answer."""
        connection = http.client.HTTPSConnection("127.0.0.1", self._port, timeout=120, context=self._context)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, {"Content-Type": kind})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


class Jobs:
    """The FineTuneJobs of a namespace."""

    def __init__(self, server: Server, namespace: str) -> None:
        self._server, self._namespace = server, namespace

    def create(self, obj: dict[str, Any], *, dry: bool = False) -> tuple[int, Any]:
        """POST, strict about unknown fields as kubectl is."""
        here = {**obj, "metadata": {**obj["metadata"], "namespace": self._namespace}}
        query = "?fieldValidation=Strict" + ("&dryRun=All" if dry else "")
        return self._server.call("POST", self._path("") + query, here)

    def created(self, obj: dict[str, Any]) -> dict[str, Any]:
        """What the server made of it."""
        code, answer = self.create(obj)
        assert code == 201, answer
        return dict(answer)

    def patch(self, name: str, body: Any, kind: str = MERGE_PATCH, *, part: str = "") -> tuple[int, Any]:
        """PATCH of the object, or of its status."""
        return self._server.call("PATCH", self._path(f"/{name}{part}") + "?fieldValidation=Strict", body, kind)

    def get(self, name: str) -> dict[str, Any]:
        """The object as it is served."""
        return dict(self._server.call("GET", self._path(f"/{name}"))[1])

    def _path(self, rest: str) -> str:
        return f"/apis/finetune.dev/v1alpha1/namespaces/{self._namespace}/finetunejobs{rest}"


@pytest.fixture(scope="module")
def server(control_plane: ControlPlane) -> Server:
    """The server, once it serves FineTuneJobs."""
    serve_finetunejobs(control_plane)
    return Server(control_plane)


@pytest.fixture(scope="module")
def nowhere(server: Server) -> Jobs:
    """For jobs that are only tried (``dry``): they need no namespace of their own."""
    return Jobs(server, "default")


@pytest.fixture
def jobs(server: Server, namespace: str) -> Jobs:
    """The jobs of a namespace of this test's own."""
    return Jobs(server, namespace)


def causes(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """(field, reason) of every cause, fields that the decoder does not know included."""
    unknown = re.findall(r'unknown field "([^"]+)"', answer["message"])
    listed = answer.get("details", {}).get("causes", [])
    return [*((name, "Unknown") for name in unknown), *((c.get("field", ""), c["reason"]) for c in listed)]


def parent(path: str) -> str:
    """The place round a place."""
    return path.removesuffix(path[path.rindex("[") :] if path.endswith("]") else path[path.rindex(".") :])


def test_the_server_keeps_every_word_of_the_definition(server: Server) -> None:
    """It is structural, within the limits of CEL's cost at all bounds, and nothing of it is dropped without a word."""
    code, kept = server.call("GET", CRD_PATH)
    assert code == 200
    conditions = {c["type"]: c["status"] for c in kept["status"]["conditions"]}
    assert conditions["Established"] == conditions["NamesAccepted"] == "True"
    assert conditions.get("NonStructuralSchema", "False") == "False"
    assert kept["spec"]["versions"][0]["schema"]["openAPIV3Schema"] == crd.schema()
    assert crd.lacks(kept) == []


def test_the_smallest_job_is_taken_and_filled_in(jobs: Jobs) -> None:
    """The server adds the defaults that stand outside stages' blocks, and the code reads the same job as before."""
    sent = yaml.safe_load(SMALLEST)
    served = jobs.created(copy.deepcopy(sent))
    assert served["spec"]["seed"] == 42
    assert served["spec"]["suspend"] is False
    assert served["spec"]["storage"]["checksum"] == "auto"
    assert served["spec"]["data"]["train"][0] == {
        "source": "s3://datasets/support/train.jsonl",
        "format": "auto",
        "split": "train",
        "weight": 1.0,
    }
    assert served["spec"]["evaluation"]["gates"] == {"maxRegression": 0.05, "failJob": False}
    first = served["spec"]["pipeline"][0]
    assert (first["sft"], first["retries"], first["resources"]["gpus"]) == ({"method": "qlora"}, 3, 1)
    assert "template" not in served["spec"]
    assert parse(served).spec == parse(sent).spec


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_every_example_is_taken_by_kubectl(control_plane: ControlPlane, jobs: Jobs, namespace: str, path: Path) -> None:
    """``kubectl apply -f`` of an example has nothing to complain of, unknown fields included."""
    control_plane.kubectl("-n", namespace, "apply", "--dry-run=server", "--validate=strict", "-f", str(path))


RATES = (1e-5, 0.0002, 1)


def test_numbers_may_be_written_in_any_way(jobs: Jobs) -> None:
    """1e-5, 0.0002 and 1 are learning rates; 1.0 is no change of 1, so it is not refused as one."""
    job = raw_job(*({"name": f"s{n}", "sft": {"training": {"learningRate": rate}}} for n, rate in enumerate(RATES)))
    made = jobs.created(job)
    stages = copy.deepcopy(made["spec"]["pipeline"])
    stages[2]["sft"]["training"]["learningRate"] = 1.0
    code, answer = jobs.patch("bot", {"spec": {"pipeline": stages}})
    assert code == 200, answer
    assert [s["sft"]["training"]["learningRate"] for s in answer["spec"]["pipeline"]] == list(RATES)


def test_null_is_absent(nowhere: Jobs) -> None:
    """``merge:`` without a value is no block, as the local loader reads it."""
    code, answer = nowhere.create(raw_job(SFT, {"name": "merge", "merge": None}), dry=True)
    assert code == 422
    assert ("spec.pipeline[1]", "FieldValueInvalid") in causes(answer)


def test_explain_reads_well(control_plane: ControlPlane, server: Server) -> None:
    """``kubectl explain`` shows what a block is, and each field's type and docstring in plain words."""
    text = control_plane.kubectl("explain", "ftj.spec.pipeline.sft.lora")
    assert "DESCRIPTION:\n    For lora and qlora only." in text
    assert re.search(r"\n  r\t<integer>\n    Rank\. Default: 16\.\n", text)
    assert re.search(
        r"\n  targetModules\t<\[\]string>\n    Module names, or `\[all-linear\]`: every linear layer", text
    )
    assert "``" not in text
    for path in ("ftj", "ftj.spec", "ftj.spec.pipeline", "ftj.spec.pipeline.sft.training", "ftj.status.stages"):
        text = control_plane.kubectl("explain", path)
        assert text.count("DESCRIPTION:") == 1
        assert "<empty>" not in text.replace("apiVersion", "").replace("kind", "")


@pytest.mark.parametrize("entry", REFUSED_BY_THE_SERVER, ids=named)
def test_the_server_names_the_place_that_plan_names(nowhere: Jobs, entry: tuple[Any, ...]) -> None:
    """A bad job is not stored; the refusal has the place that ``finetune plan`` gives, or the one round it.

    Where something else than a mapping belongs, the decoder stumbles over the first field inside.
    """
    code, answer = nowhere.create(broken(entry[0], entry[1]), dry=True)
    path = entry[-1] if len(entry) > 2 else entry[0]
    assert code in (400, 422), answer
    fields = [field for field, _ in causes(answer)]
    told = any(field in (path, parent(path)) or field.startswith(f"{path}.") for field in fields)
    assert told or f"{path}: there is no earlier stage" in answer["message"], answer["message"]


@pytest.mark.parametrize("entry", SEEN_BY_PLAN_ONLY, ids=named)
def test_the_server_takes_what_only_rules_can_see(nowhere: Jobs, entry: tuple[Any, ...]) -> None:
    """These the operator refuses; the list of them is true, so that nothing is thought to be checked earlier."""
    code, answer = nowhere.create(broken(entry[0], entry[1]), dry=True)
    assert code == 201, answer


FIRST = {"name": "sft", "sft": {"training": {"packing": False, "microBatchSize": 2}}}
# From base, so that as far as a schema can tell the two may stand in either order.
SECOND = {**MERGE, "from": "base"}
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": {"source": "hf://org/other"}}, "spec.model"),
    "data": ({"data": {"eval": [{"source": "s3://data/e.jsonl"}]}}, "spec.data"),
    "storage": ({"storage": {"prefix": "elsewhere"}}, "spec.storage"),
    "seed": ({"seed": 7}, "spec.seed"),
    "evaluation": ({"evaluation": {"maxRows": 5}}, "spec.evaluation"),
    "template added": ({"template": {"image": "x"}}, "spec.template"),
    "a stage less": ({"pipeline": [FIRST]}, "spec.pipeline"),
    "order of stages": ({"pipeline": [SECOND, FIRST]}, "spec.pipeline"),
    "name of a stage": ({"pipeline": [{**FIRST, "name": "tune"}, SECOND]}, "spec.pipeline"),
    "number or word": (
        {"pipeline": [{"name": "sft", "sft": {"training": {"packing": False, "microBatchSize": "auto"}}}, SECOND]},
        "spec.pipeline",
    ),
    "true, false or word": (
        {"pipeline": [{"name": "sft", "sft": {"training": {"packing": "auto", "microBatchSize": 2}}}, SECOND]},
        "spec.pipeline",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_results_depend_on_cannot_be_changed(jobs: Jobs, change: str) -> None:
    """Each field on its own, whether it was there before or not, and the order of the stages."""
    jobs.created(raw_job(FIRST, SECOND))
    body, place = CHANGES[change]
    code, answer = jobs.patch("bot", {"spec": body})
    assert code == 422, answer
    assert causes(answer) == [(place, "FieldValueForbidden")]
    assert "is immutable" in answer["message"]


def test_what_was_written_cannot_be_taken_away(jobs: Jobs) -> None:
    """Removing an optional field is a change as well."""
    jobs.created(raw_job(template={"image": "x"}))
    code, answer = jobs.patch("bot", {"spec": {"template": None}})
    assert (code, causes(answer)) == (422, [("spec.template", "FieldValueForbidden")])


def test_a_job_can_be_suspended_and_its_record_kept_shorter(jobs: Jobs) -> None:
    """The three fields that steer rather than describe may change at any time."""
    jobs.created(raw_job())
    for body in (
        {"suspend": True},
        {"ttlSecondsAfterFinished": 60},
        {"pendingDeadlineSeconds": 60},
        {"suspend": False},
    ):
        code, answer = jobs.patch("bot", {"spec": body})
        assert code == 200, answer


def a_status() -> JobStatus:
    """What ``plan`` makes of a job half-way through, with everything in it that a status can have."""
    figures: dict[str, float | int | str] = {
        "loss": 0.1 + 0.2,
        "rows": 7,
        "whole": 3.0,
        "gatesFailed": "a, b",
        "big": 2**40,
    }
    files = [Artifact(stage="prepare", name=n, uri=f"s3://b/{n}", size_bytes=2**33, sha256="a" * 64) for n in "xy"]
    left = StageResult(digest="d" * 64, manifest="k/manifest.json", artifacts=files, figures=figures)
    point = Progress(
        step=3,
        total_steps=9,
        percent=33,
        eta_seconds=61,
        tokens_per_second=8123,
        metrics=[MetricValue(name="loss", value="1.31")],
        updated_time=NOW,
    )
    job = a_job()
    children = [
        succeeded("prepare", result=left, end=after(10.123456), found=found("baseline")),
        running("sft", progress=point, checkpoint=CheckpointStatus(step=2, uri="s3://b/c"), start=after(11)),
    ]
    status = plan(job, JobStatus(), children, after(12)).status
    assert status.artifacts
    assert status.stages[0].running_seconds == 10.123456
    return status


def test_a_status_comes_back_as_it_was_written(jobs: Jobs) -> None:
    """Nothing is dropped, rounded or refused, and writing it leaves spec and generation alone."""
    made = jobs.created(raw_job())
    status = a_status()
    code, answer = jobs.patch("bot", {"status": status.model_dump(mode="json", by_alias=True)}, part="/status")
    assert code == 200, answer
    kept = jobs.get("bot")
    assert JobStatus.model_validate(kept["status"]) == status
    assert kept["spec"] == made["spec"]
    assert kept["metadata"]["generation"] == made["metadata"]["generation"]


def test_a_state_of_a_later_operator_is_taken(jobs: Jobs) -> None:
    """An older schema does not stop a newer operator from telling the truth."""
    jobs.created(raw_job())
    stage = {"name": "sft", "state": "Dreaming", "reason": "NewReason"}
    code, answer = jobs.patch("bot", {"status": {"stages": [stage]}}, part="/status")
    assert code == 200, answer
    assert answer["status"]["stages"] == [stage]


def test_the_spec_is_not_written_through_the_status_nor_the_other_way(jobs: Jobs) -> None:
    """``status`` is a subresource: who may write one need not be allowed to write the other."""
    jobs.created({**raw_job(), "status": {"summary": "made up"}})
    assert "status" not in jobs.get("bot")
    jobs.patch("bot", {"status": {"summary": "true"}, "spec": {"suspend": True}}, part="/status")
    kept = jobs.get("bot")
    assert (kept["status"]["summary"], kept["spec"]["suspend"]) == ("true", False)


def test_columns_show_the_status(control_plane: ControlPlane, jobs: Jobs, namespace: str) -> None:
    """``kubectl get ftj`` prints what the operator wrote, under these headings."""
    jobs.created(raw_job())
    status = {"stage": "sft", "progress": "2/7 33%", "eta": "1m", "summary": "Running sft"}
    jobs.patch("bot", {"status": status}, part="/status")
    heads, row = control_plane.kubectl("-n", namespace, "get", "ftj").splitlines()
    assert heads.split() == ["NAME", "STAGE", "PROGRESS", "ETA", "STATUS", "AGE"]
    assert re.fullmatch(r"bot +sft +2/7 33% +1m +Running sft +\d+s", row.strip())
    assert "finetunejob.finetune.dev/bot" in control_plane.kubectl("-n", namespace, "get", "all", "-o", "name")


def largest() -> dict[str, Any]:
    """A job of 32 stages with long texts everywhere: about 850 KB."""
    modules = [f"{n:03}{'m' * 125}" for n in range(64)]
    source = {"source": "s3://b/" + "k" * 1017, "columns": {f"{n:02}{'c' * 126}": "v" * 128 for n in range(16)}}
    stages: list[dict[str, Any]] = [
        {
            "name": f"{'s' * 30}{n:02}".replace("0", "a"),
            "from": "base",
            "sft": {"lora": {"targetModules": modules}, "training": {"microBatchSize": 1, "packing": "auto"}},
            "retries": 100,
        }
        for n in range(32)
    ]
    return raw_job(
        *stages,
        model={"source": "hf://org/model", "chatTemplate": "t" * 65536},
        data={"train": [source] * 32, "preference": [source] * 16},
        template={"env": [{"name": f"V{n}", "value": "e" * 3500} for n in range(64)]},
        evaluation={"gates": {"maxGGUFDivergence": {f"{n:02}{'g' * 126}": 1 for n in range(64)}}},
    )


def test_a_job_of_32_long_stages_is_created_and_changed(jobs: Jobs) -> None:
    """What the rules cost when they run is within the server's budget: at creation, at a change, at a refusal."""
    job = largest()
    assert 800_000 < len(json.dumps(job)) < 1_200_000
    made = jobs.created(job)
    assert len(made["spec"]["pipeline"]) == 32
    code, answer = jobs.patch("bot", {"spec": {"suspend": True}})
    assert code == 200, answer
    stages = copy.deepcopy(made["spec"]["pipeline"])
    stages[31]["sft"]["lora"]["targetModules"][63] = "other"
    code, answer = jobs.patch("bot", {"spec": {"pipeline": stages}})
    assert (code, causes(answer)) == (422, [("spec.pipeline", "FieldValueForbidden")])
