"""What a stage's pod is given so that it can tell its progress, and what the operator publishes for it."""

import json
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from cryptography import x509
from tests.builders import a_job
from tests.unit.progress_parts import own_certificate

from finetune_api.stage import JobRef, StageRun
from finetune_operator.certificates import LIFE, make_certificate, valid_until
from finetune_operator.plan.children import NewChild
from finetune_operator.plan.pods import PodSettings, batch_job
from finetune_operator.replicas import parse, url_of

URL = "https://finetune-operator.finetune.svc:9443/v1/progress"


def pod_of(**settings: Any) -> dict[str, Any]:
    """The pod of an attempt under such settings."""
    job = a_job()
    run = StageRun(job=JobRef(namespace="team", name="bot", uid="u-1"), stage="sft", attempt=1, spec=job.spec)
    made = batch_job(job, {}, NewChild("bot-sft-1", run), PodSettings(trainer_image="t", gguf_image="g", **settings))
    pod: dict[str, Any] = made["spec"]["template"]["spec"]
    return pod


def test_a_pod_gets_a_token_for_this_alone_and_the_certificates_when_they_come() -> None:
    """One hour, one audience, no other credential; a missing ConfigMap does not keep the pod from starting."""
    pod, without = pod_of(progress_url=URL), pod_of()
    container, bare = pod["containers"][0], without["containers"][0]
    [volume] = [v for v in pod["volumes"] if v not in without["volumes"]]
    assert volume["projected"]["sources"] == [
        {"serviceAccountToken": {"audience": "finetune.dev/progress", "expirationSeconds": 3600, "path": "token"}},
        {
            "configMap": {
                "name": "finetune-progress",
                "optional": True,
                "items": [{"key": "ca.pem", "path": "ca.pem"}],
            }
        },
    ]
    mount = {"name": volume["name"], "mountPath": "/var/run/finetune"}
    assert [m for m in container["volumeMounts"] if m not in bare["volumeMounts"]] == [mount]
    assert [variable for variable in container["env"] if variable not in bare["env"]] == [
        {"name": "FINETUNE_PROGRESS_URL", "value": URL},
        {"name": "FINETUNE_PROGRESS_TOKEN_FILE", "value": "/var/run/finetune/token"},
        {"name": "FINETUNE_PROGRESS_CA_FILE", "value": "/var/run/finetune/ca.pem"},
    ]
    assert pod["automountServiceAccountToken"] is False


def test_without_a_url_a_pod_gets_nothing_of_it() -> None:
    """No variable and no volume, so that a stage does not try."""
    assert "progress" not in json.dumps(pod_of()).lower()


def test_a_certificate_is_good_for_its_names_and_signs_nothing() -> None:
    """Service names and pod address, IPv6 too; seven days; it is no authority for others."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    made = make_certificate(["finetune-operator.finetune.svc"], "fd00::7", now)
    read = x509.load_pem_x509_certificate(made.pem.encode())
    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["finetune-operator.finetune.svc"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["fd00::7"]
    assert read.not_valid_before_utc < now
    assert valid_until(made.pem) == now + LIFE == now + timedelta(days=7)
    assert read.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert read.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
    assert "PRIVATE" not in repr(made)
    assert made.pem.count("-----BEGIN") == 1


def test_a_certificate_is_changed_after_two_thirds_of_its_life() -> None:
    """Until then it stays; then two are published for an hour; then the new one alone, and so on for ever."""
    now = start = datetime(2026, 1, 1, tzinfo=UTC)
    own = own_certificate(start)
    first = own.published
    counts = []
    while now < start + timedelta(days=30):
        now += timedelta(minutes=20)
        own.renew(now)
        counts.append(len(own.published))
        assert all(valid_until(pem) > now + timedelta(days=2) for pem in own.published)
    assert own.published != first
    assert counts[: 3 * 24 * 4 + 3 * 8] == [1] * (3 * 24 * 4 + 3 * 8)
    changes = sum(1 for before, after in pairwise(counts) if (before, after) == (1, 2))
    assert changes == 6
    assert counts.count(2) == 3 * changes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "{",
        "[" * 100_000,
        json.dumps({"url": "https://10.0.0.1:9443"}),
        json.dumps({"url": "https://10.0.0.1:9443", "certificates": []}),
        json.dumps({"url": "https://10.0.0.1:9443", "certificates": ["nonsense"]}),
        json.dumps({"url": "http://10.0.0.1:9443", "certificates": own_certificate().published}),
    ],
)
def test_an_entry_that_cannot_be_used_is_an_error(text: str) -> None:
    """A broken certificate in the bundle would take all others away from every stage."""
    with pytest.raises(ValueError, match=r"."):
        parse(text)


def test_a_replica_is_reached_by_its_pods_address() -> None:
    """Of either family."""
    assert url_of("10.1.2.3", 9443) == "https://10.1.2.3:9443"
    assert url_of("fd00::7", 9443) == "https://[fd00::7]:9443"
