import itertools
import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.builders import DPO, GGUF, MERGE, SFT, a_job

from finetune_api.pipeline import order, targets
from finetune_api.stage import Artifact, File, JobRef, Manifest
from finetune_jobs.evaluation import failures
from finetune_jobs.evaluation.answers import Answer, grade, summarise
from finetune_jobs.evaluation.answers import Question as Asked
from finetune_jobs.evaluation.charts import Line, line_chart, ticks
from finetune_jobs.evaluation.page import duration, figure, render, size
from finetune_jobs.evaluation.report import Evidence, build, rollback

JOB = JobRef(namespace="team", name="bot", uid="u")
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
ENVIRONMENT = {"python": "3.11", "cpu": {"cores": 2}, "gpus": [], "packages": {"torch": "2.15"}}


def said(
    row: str, text: str, role: str = "test", reference: str = "Paris", expect: str | None = None, **more: Any
) -> Answer:
    """An answer, graded as the stages do."""
    asked = Asked(role, row, f"prompt {row}", [1], reference=None if expect else reference, expect=expect)
    scores = grade(asked, text, ["exactMatch", "tokenF1"])
    answer = Answer(id=row, role=role, prompt=asked.prompt, reference=asked.reference, expect=expect)
    return answer.model_copy(update={"answer": text, "finished": True, "tokens": 3, "scores": scores, **more})


def answers(*texts: str, general: str = "Paris", refusal: str = "I cannot do that.") -> list[Answer]:
    """Test answers with losses, one general and one refusals answer."""
    test = [said(str(i), text, loss=1.0 + i, loss_tokens=2) for i, text in enumerate(texts)]
    return [*test, said("g", general, "general"), said("r", refusal, "refusals", expect="refuse")]


def training_log(stage: str, kind: str) -> dict[str, Any]:
    """As the training stages write it, with what the report reads."""
    rewards = (
        {"rewards/accuracies": 0.9, "rewards/margins": 0.4, "rewards/chosen": -0.02} if kind == "preference" else {}
    )
    held_out = {f"eval/{name}": value for name, value in rewards.items()}
    return {
        "stage": stage,
        "kind": kind,
        "method": "lora",
        "precision": "float32",
        "device": "cpu",
        "parameters": {"trainable": 1000, "total": 100_000},
        "training": {"batchSize": 4, "learningRate": 2e-3},
        "lora": {"r": 16},
        "quantization": None,
        "seed": 42,
        "batch": {},
        "examples": {"train": 40, "eval": 12, "dropped": {}},
        "steps": 8,
        "totalSteps": 8,
        "stoppedEarly": False,
        "resultStep": 8,
        "evalLoss": 0.4,
        "resumedFrom": [],
        "curve": [{"step": s, "loss": 3.0 / s, "learningRate": 1e-3, **rewards} for s in (1, 4, 8)],
        "evaluations": [{"step": s, "evalLoss": 2.0 / s, **held_out} for s in (4, 8)],
        "tokensPerSecond": 100.0,
        "seconds": 12.0,
        "environment": ENVIRONMENT,
    }


def evidence(
    *stages: dict[str, Any], base: list[Answer], tuned: list[Answer], source: str = "hf://org/model", **spec: Any
) -> Evidence:
    """A finished run of these stages in which every target gave the same answers."""
    job = a_job(*stages, model={"source": source}, **spec)
    logs: dict[str, dict[str, Any]] = {name: {} for name in order(job.spec)[:-1]}
    logs["prepare"] = {"base.json": {"kind": "hub", "repository": "org/model", "revision": "c0ffee"}}
    for stage in job.spec.pipeline:
        match stage:
            case _ if stage.sft:
                logs[stage.name]["training.json"] = training_log(stage.name, "sft")
            case _ if stage.preference:
                logs[stage.name]["training.json"] = training_log(stage.name, "preference")
            case _ if stage.merge:
                logs[stage.name]["merge.json"] = {
                    "modules": {"count": 14, "largestError": 1e-3},
                    "logits": {"skipped": "memory"},
                    "environment": ENVIRONMENT,
                }
            case _:
                logs[stage.name]["quantize.json"] = {"environment": ENVIRONMENT, "types": {"Q4_K_M": QUANTIZED}}
    settings = {"metrics": ["exactMatch", "tokenF1"], "maxNewTokens": 16, "maxNewTokensOfSpotChecks": 16}
    figures = {"generatedTokens": 100, "tokensPerSecond": 50.0}
    scored = {"base": base, **{t.name: tuned for t in targets(job.spec)}}
    logs["baseline"]["scores.json"] = {"environment": ENVIRONMENT}
    logs["evaluate"]["scores.json"] = {
        "scores": {name: summarise(a) | figures for name, a in scored.items()},
        "settings": settings,
        "definitions": {"exactMatch": "share equal"},
        "environment": ENVIRONMENT,
    }
    manifests = {name: result(name, place) for place, name in enumerate(order(job.spec)[:-1])}
    return Evidence(JOB, job.spec, manifests, logs, scored)


def result(stage: str, place: int) -> Manifest:
    """What the stage committed, each a minute after the one before."""
    outputs = {"prepare": ["base", "data/default/test"], "sft": ["adapter"], "dpo": ["adapter"], "merge": ["model"]}
    file = File(path="data/default/test.jsonl", key="k", size_bytes=1, sha256="d" * 64)
    gguf = Artifact(stage=stage, name="Q4_K_M", uri="s3://b/x/bot-Q4_K_M.gguf", size_bytes=1_500_000, sha256="e" * 64)
    return Manifest(
        job=JOB,
        stage=stage,
        attempt=1,
        digest=f"{place:064d}",
        inputs={"prepare:base": "sha-base"} if stage == "baseline" else {},
        outputs={name: f"sha-{name}" for name in outputs.get(stage, [])},
        files=[file] if stage == "prepare" else [],
        artifacts=[gguf] if stage == "gguf" else [],
        figures={"seconds": 3600.0, "cpuSeconds": 7000.0, "peakMemoryBytes": 10**9, "loss": 1.5},
        started=f"2026-01-01T12:{place:02d}:00+00:00",
        finished=f"2026-01-01T12:{place:02d}:59+00:00",
    )


QUANTIZED = {
    **{"parameters": 2_400_000, "bitsPerWeight": 4.99, "kl": 0.0123, "top1": 0.97, "imatrix": True},
    "withoutImatrix": {"kl": 0.0456, "klStandardError": 0.001, "top1": 0.95},
}


class Tags(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        self.tags.append((tag, dict(attrs)))


FULL = [SFT, DPO, MERGE, GGUF]


def test_a_whole_pipeline_passes_and_every_section_is_there() -> None:
    """A good run has all lab rows passed, one score per target and metric, and each section on the page."""
    report = build(evidence(*FULL, base=answers("x", "Rome"), tuned=answers("Paris", "Paris")))
    assert report["targets"] == ["base", "merge", "gguf/Q4_K_M", "gguf/Q8_0"]
    assert report["mainTarget"] == "merge"
    assert [report["scores"][t]["exactMatch"] for t in report["targets"]] == [0.0, 1.0, 1.0, 1.0]
    assert [(row["requirement"], row["passed"]) for row in report["lab"]] == [
        (name, True) for name in ("Environment", "Baseline", "Evaluation", "Regression check", "Reproducibility")
    ]
    assert report["gatesPassed"] is True
    assert report["preference"]["dpo"]["chosenLogProbChange"] == pytest.approx(-0.02 / 0.1)
    page = render(report)
    sections = [attributes["id"] for tag, attributes in Tags(page).tags if tag == "section"]
    names = "scores gates training examples failures data reproduce rollback artifacts"
    assert sections == names.split()
    assert page.count("<svg") == 6  # loss and learning rate of both stages, reward accuracy and margin of dpo
    assert "exactMatch 0 &rarr; 1" in page


@pytest.mark.parametrize(
    "stages",
    [[SFT], [{"name": "sft", "sft": {"method": "full"}}], [GGUF], [SFT, MERGE], [SFT, {**DPO, "from": "sft"}]],
    ids=["adapter", "full", "only gguf", "merged", "adapter trained on"],
)
def test_a_shorter_pipeline_has_a_shorter_report(stages: list[dict[str, Any]]) -> None:
    """Sections without content say so or stay out; nothing fails for want of a stage."""
    report = build(evidence(*stages, base=answers("x"), tuned=answers("Paris")))
    page = render(report)
    assert ("GGUF files" in page) is any("quantize" in s for s in stages)
    assert ("Q4_K_M without the importance matrix: KLD 0.046" in page) is ("GGUF files" in page)
    assert ("What fewer bits cost" in page) is ("GGUF files" in page)
    assert ("This job trained nothing." in page) is (stages == [GGUF])
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    ("backend", "fallback", "words"),
    [
        ("transformers", None, "bfloat16 on cuda:0, 100"),
        ("unsloth", None, "bfloat16 on cuda:0 by Unsloth's kernels, 100"),
        ("transformers", "there is no GPU", "bfloat16 on cuda:0 without Unsloth (there is no GPU), 100"),
    ],
)
def test_whose_kernels_trained_is_told(backend: str, fallback: str | None, words: str) -> None:
    """And why not those that were asked for."""
    content = evidence(SFT, base=answers("x"), tuned=answers("Paris"))
    said = {"backend": backend, "fallback": fallback, "precision": "bfloat16", "device": "cuda:0"}
    content.logs["sft"]["training.json"].update(said)
    assert words in render(build(content))


def test_plain_text_rows_make_a_report_of_losses() -> None:
    """Without prompts there is no text score: the loss is the headline, and failures are ordered by it."""
    base = [Answer(id=str(i), role="test", prompt="", loss=2.0, loss_tokens=5) for i in range(4)]
    tuned = [a.model_copy(update={"loss": 1.0 + i}) for i, a in enumerate(base)]
    spot = answers()
    content = evidence(SFT, MERGE, base=[*base, *spot], tuned=[*tuned, *spot])
    content.logs["evaluate"]["scores.json"]["settings"]["metrics"] = ["loss"]
    report = build(content)
    found = report["failures"]["merge"]
    assert [(f["kind"], f["id"]) for f in found] == [("regression", "3"), ("regression", "2"), ("highestLoss", "1")]
    assert "loss 2.000 &rarr; 2.500" in render(report)


def test_no_text_of_the_data_becomes_markup() -> None:
    """Prompts, answers, references, stage figures and sources that contain tags are shown, not obeyed."""
    base, tuned = answers(EVIL, EVIL, general=EVIL, refusal=EVIL), answers(EVIL, EVIL, general=EVIL, refusal=EVIL)
    evil = [a.model_copy(update={"prompt": EVIL, "reference": a.reference and EVIL}) for a in tuned]
    content = evidence(
        *FULL, base=[a.model_copy(update={"prompt": EVIL}) for a in base], tuned=evil, source=f"file:///{EVIL}"
    )
    content.logs["prepare"]["datacard.json"] = {"warnings": [EVIL], "sets": {}}
    content.logs["sft"]["training.json"]["training"]["evil"] = EVIL
    page = render(build(content))
    assert EVIL not in page
    assert page.count("&lt;script&gt;") >= 8
    tags = Tags(page).tags
    assert not [t for t, _ in tags if t in ("script", "img", "iframe", "object", "embed", "link", "form")]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    """Every link is relative and no style or picture is fetched, so the page works offline and from a bucket."""
    page = render(build(evidence(*FULL, base=answers("x"), tuned=answers("Paris"))), evidence="evidence/")
    links = [value for _, a in Tags(page).tags for name, value in a.items() if name in ("href", "src") and value]
    assert links
    assert all(re.match(r"(#|report\.json$|evidence/)", link) for link in links), links
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_headings_do_not_skip_a_level_and_tables_name_their_columns() -> None:
    """What a screen reader needs: one h1, levels in order, scopes on header cells, a language, labelled charts."""
    page = render(build(evidence(*FULL, base=answers("x"), tuned=answers("Paris"))))
    tags = Tags(page).tags
    levels = [int(t[1]) for t, _ in tags if re.fullmatch(r"h[1-6]", t)]
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(a.get("scope") in ("col", "row") for t, a in tags if t == "th")
    assert ("html", {"lang": "en"}) in tags
    assert all(a.get("aria-label") for t, a in tags if t == "svg")


def replace(content: Evidence, target: str, **changed: Any) -> None:
    """Change a target's first answer."""
    answers = content.answers[target]
    assert isinstance(answers, list)
    answers[0] = answers[0].model_copy(update=changed)


def scores(content: Evidence) -> dict[str, Any]:
    """Of the merged model."""
    found: dict[str, Any] = content.logs["evaluate"]["scores.json"]["scores"]["merge"]
    return found


SPOILED = {
    "environment": (
        lambda e: e.logs["merge"]["merge.json"].pop("environment"),
        "Environment",
        "without a record: merge",
    ),
    "silent": (lambda e: scores(e).update(generatedTokens=0), "Environment", "generated nothing: merge"),
    "baseline": (lambda e: replace(e, "base", answer=None), "Baseline", "2 of 3"),
    "row missing": (lambda e: e.answers["merge"].pop(0), "Evaluation", "other rows or prompts: merge"),
    "other prompt": (lambda e: replace(e, "merge", prompt="other"), "Evaluation", "other rows or prompts: merge"),
    "spot check": (lambda e: scores(e).pop("refusals"), "Regression check", "not checked: merge on refusals"),
    "settings": (
        lambda e: e.logs["sft"]["training.json"].pop("training"),
        "Reproducibility",
        "missing: hyperparameters",
    ),
    "data": (lambda e: e.manifests["prepare"].files.clear(), "Reproducibility", "missing: dataset"),
}


@pytest.mark.parametrize(("spoil", "requirement", "words"), SPOILED.values(), ids=SPOILED.keys())
def test_a_lab_row_fails_when_its_evidence_is_not_there(spoil: Any, requirement: str, words: str) -> None:
    """Each row is judged on the artifacts: take its evidence away and that row fails, saying what is missing."""
    content = evidence(SFT, MERGE, base=answers("x"), tuned=answers("Paris"))
    spoil(content)
    try:
        rows = {row["requirement"]: row for row in build(content)["lab"]}
    except KeyError:
        pytest.fail("the report must be made whatever is missing")
    assert [name for name, row in rows.items() if not row["passed"]] == [requirement]
    assert words in " ".join(rows[requirement]["evidence"])


@pytest.mark.parametrize(("same", "passed"), [(True, True), (False, False)], ids=["same files", "other files"])
def test_a_baseline_taken_after_a_reused_training_counts_only_for_the_same_base_model(same: bool, passed: bool) -> None:
    """After a change of maxRows the baseline runs anew, the training is reused: said in words, the digest decides."""
    content = evidence(SFT, MERGE, base=answers("x"), tuned=answers("Paris"))
    late = content.manifests["baseline"].model_copy(
        update={
            "finished": "2026-01-02T00:00:00+00:00",
            "inputs": {"prepare:base": "sha-base" if same else "sha-other"},
        }
    )
    content = Evidence(
        content.job, content.spec, {**content.manifests, "baseline": late}, content.logs, content.answers
    )
    row = next(r for r in build(content)["lab"] if r["requirement"] == "Baseline")
    assert row["passed"] is passed
    assert "trained earlier and was reused" in " ".join(row["evidence"])


def test_a_failed_gate_is_named_in_the_report_and_on_the_page() -> None:
    """The figure, the list of names and the page say the same."""
    content = evidence(
        SFT,
        MERGE,
        base=answers("x"),
        tuned=answers("Paris", general="no"),
        evaluation={"gates": {"minScore": {"exactMatch": 1.0}}},
    )
    report = build(content)
    assert report["gatesFailed"] == ["maxRegression.general of merge"]
    assert report["gatesPassed"] is False
    assert "1 of 8 gates failed:" in render(report)


def test_failures_put_regressions_first_then_low_scores_then_high_losses() -> None:
    """At least three rows, worst fall first, none twice, each with its kind."""
    base = answers("Paris", "Paris", "x", "x")
    tuned = answers("Paris x", "nothing", "y", "Paris", general="Paris")
    found = failures.analyse(base, tuned)
    assert [(f.kind, f.tuned.id) for f in found] == [("regression", "1"), ("regression", "0"), ("lowestScore", "2")]
    good = failures.analyse(base, answers("Paris", "Paris", "Paris", "Paris"))
    assert [(f.kind, f.tuned.id) for f in good] == [("highestLoss", "3"), ("highestLoss", "2"), ("highestLoss", "1")]
    untold = [a.model_copy(update={"loss": None}) for a in answers("Paris", "Paris")]
    right = [(f.kind, f.symptom) for f in failures.analyse(untold, untold)]
    assert right == [("lowestScore", "right"), ("lowestScore", "right"), ("lowestScore", "right")]
    many = failures.analyse(answers(*["Paris"] * 30), answers(*["x"] * 30))
    assert [f.kind for f in many] == ["regression"] * 10


@pytest.mark.parametrize(
    ("text", "reference", "symptom"),
    [
        ('{"a": 2, "c": 3}', '{"a": 1, "b": 2}', "fields: wrong a; missing b; extra c"),
        ('{"a":1}', '{"a": 1}', "same fields and values, written otherwise"),
        ("a is 1", '{"a": 1}', "not valid JSON"),
        ("[1]", '{"a": 1}', "JSON, but no object"),
        ("the big cat", "a small cat", "word F1 0.50"),
        (" ", "cat", "said nothing"),
        ("cat", "cat", "right"),
    ],
)
def test_a_symptom_says_what_can_be_seen(text: str, reference: str, symptom: str) -> None:
    """For JSON references the differing fields are named, for texts the overlap of words."""
    assert failures.symptom(said("1", text, reference=reference)) == symptom


def test_an_answer_that_never_ended_is_told_from_a_wrong_one() -> None:
    """Running into the limit is a failure of its own kind."""
    assert failures.symptom(said("1", "Paris Paris", finished=False, tokens=64)) == "did not end within 64 tokens"


def test_rollback_names_every_earlier_model_with_digest_and_command() -> None:
    """Nearest first, down to the base model at its revision; the namespace is in the commands."""
    ways = rollback(evidence(SFT, DPO, MERGE, base=answers("x"), tuned=answers("x")))
    assert [(w["to"], w["digest"], w["command"]) for w in ways] == [
        ("model of stage merge", "sha-model", "finetune pull bot merge/model -n team -o rollback"),
        ("adapter of stage dpo", "sha-adapter", "finetune pull bot dpo/adapter -n team -o rollback"),
        ("adapter of stage sft", "sha-adapter", "finetune pull bot sft/adapter -n team -o rollback"),
        ("base model hf://org/model", "sha-base", "hf download org/model --revision c0ffee --local-dir rollback"),
    ]


def test_several_adapters_are_shown_with_their_weights() -> None:
    """How they were combined, what a low rank left out, and the adapter that svd left, on the weights it belongs to."""
    named = {
        "adapters": [{"stage": "sft"}, {"stage": "other", "weight": 0.5, "checkpoint": "best"}],
        "combination": "svd",
    }
    other = {"name": "other", "from": "base", "sft": {}}
    content = evidence(SFT, other, {"name": "merge", "merge": named}, base=answers("x"), tuned=answers("Paris"))
    entries = [{"stage": "sft", "weight": 1.0}, {"stage": "other", "weight": 0.5, "checkpoint": "best", "step": 4}]
    told = {"adapters": entries, "combination": "svd", "svd": {"largestLoss": 0.25}}
    content.logs["merge"]["merge.json"] |= told  # type: ignore[index]
    content.manifests["merge"].outputs["adapter"] = "sha-combined"
    report = build(content)
    assert report["targets"] == ["base", "merge"]
    page = render(report)
    assert "Combined: svd; the low rank leaves out at most 0.250 of a change" in page
    assert '<tr><td>sft</td><td class="n">1.000</td><td>the result</td></tr>' in page
    assert '<tr><td>other</td><td class="n">0.500</td><td>step 4</td></tr>' in page
    ways = {way["to"]: way["on"] for way in report["rollback"]}
    assert ways["adapter of stage merge"] == "base model"
    assert ways["model of stage merge"] is None


def test_device_hours_run_until_the_result_is_uploaded() -> None:
    """Two GPUs that worked for an hour and uploaded for another were held for four hours."""
    content = evidence(SFT, base=answers("x"), tuned=answers("x"))
    times = {"started": "2026-01-01T12:00:00+00:00", "finished": "2026-01-01T14:00:00+00:00"}
    content.manifests["sft"] = content.manifests["sft"].model_copy(update=times)  # type: ignore[index]
    gpus = [{"name": "H100"}, {"name": "H100"}]
    content.logs["sft"]["training.json"]["environment"] = {**ENVIRONMENT, "gpus": gpus}
    (stage,) = [s for s in build(content)["stages"] if s["name"] == "sft"]
    assert (stage["deviceHours"], stage["seconds"], stage["device"]) == (4.0, 3600.0, "2 x H100")


def test_a_base_model_in_a_bucket_is_fetched_from_the_store_it_lies_in() -> None:
    """The command goes to the endpoint of the job's storage, through which the job read the model."""
    storage = {"bucket": "bucket", "endpoint": "https://store.example"}
    content = evidence(SFT, base=answers("x"), tuned=answers("x"), source="s3://models/m", storage=storage)
    content.logs["prepare"]["base.json"] = {"kind": "s3", "bucket": "models"}  # type: ignore[index]
    assert rollback(content)[-1]["command"] == (
        "aws s3 cp --recursive s3://models/m rollback --endpoint-url https://store.example"
    )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 3.21, [0, 1, 2, 3, 4]),
        (1, 16, [0, 5, 10, 15, 20]),
        (0.0, 0.0, [0, 0.2]),
        (-0.5, 0.4, [-0.6, -0.4, -0.2, 0, 0.2, 0.4]),
        (0.0, 2e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
    ],
)
def test_ticks_are_round_numbers_that_span_the_data(low: float, high: float, expected: list[float]) -> None:
    """Steps of 1, 2 or 5 times a power of ten, the ends outside the data."""
    assert ticks(low, high) == pytest.approx(expected)


def test_a_chart_is_well_formed_and_stays_inside_its_frame() -> None:
    """Names are escaped, points that are no numbers are left out, one point is enough, none gives no chart."""
    points = [(1.0, 3.0), (5.0, float("nan")), (10.0, 0.5)]
    root = ElementTree.fromstring(line_chart([Line("<a>", points), Line("b", [(10.0, 1.0)])], x="step", y="loss"))
    lines = root.findall("polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 1]
    for line in lines:
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 440
            assert 0 <= y <= 220
    assert "<a> from 3 to 0.5" in root.attrib["aria-label"]
    assert line_chart([Line("a", []), Line("b", [(1.0, float("inf"))])], x="x", y="y") == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\u2013"),
        (0.0, "0"),
        (1.0, "1.000"),
        (0.1234, "0.123"),
        (1e-5, "1e-05"),
        (-0.05, "\u22120.050"),
        (25.74, "25.7"),
        (1234567, "1\u202f234\u202f567"),
        ("x", "x"),
    ],
)
def test_numbers_carry_the_digits_worth_reading(value: object, shown: str) -> None:
    """Large numbers are grouped, small ones keep two digits, nothing is a dash."""
    assert figure(value) == shown


def test_sizes_and_times_are_in_the_units_of_people() -> None:
    """Powers of ten for bytes; hours, minutes and seconds for times."""
    assert [size(v) for v in (None, 12, 1500, 269_060_552, 4.3e10)] == [
        "\u2013",
        "12 B",
        "1.5 kB",
        "269.1 MB",
        "43.0 GB",
    ]
    assert [duration(v) for v in (7.46, 127, 3900)] == ["7.5 s", "2 min 07 s", "1 h 05 min"]
