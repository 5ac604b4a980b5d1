import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.stages.gguf_models import TOKENIZER_FILES
from tests.stages.gguf_models import random_gguf as random_gguf
from tests.stages.gguf_models import random_model as random_model
from tests.stages.gguf_models import smollm2 as smollm2
from tests.stages.training_job import Job, JobMaker
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.stage import Manifest
from finetune_jobs.data.encode import load_tokenizer
from finetune_jobs.gguf import metadata, parity
from finetune_jobs.gguf import quantize as gguf_quantize
from finetune_jobs.gguf.engine import GGUFModel
from finetune_jobs.run.errors import ConfigurationError, PreemptedError, StageError
from finetune_jobs.run.preemption import Stop
from finetune_jobs.stages import quantize

QUESTIONS = ["Where is Oslo?", "Count to 3.", "Wie heißt du?", "Name a fruit.", "1 + 1?", "Say 'ok'."]


def rows(answer: str = "It is number {}.") -> list[dict[str, Any]]:
    """Conversations of the locked test set."""
    return [
        {
            "id": f"t{i}",
            "source": "test.jsonl",
            "line": i + 1,
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": answer.format(i)}],
        }
        for i, q in enumerate(QUESTIONS)
    ]


def job_for(make_job: JobMaker, model: Path, *types: str, test: list[dict[str, Any]] | None = None, **spec: Any) -> Job:
    """A job that only quantizes its base."""
    roles = {"test": rows() if test is None else test}
    evaluation = {"skip": True, "maxNewTokens": 8, **spec.pop("evaluation", {})}
    pipeline = [{"name": "gguf", "quantize": {"gguf": list(types)}}]
    return make_job(roles, model=model, pipeline=pipeline, evaluation=evaluation, **spec)


def set_template(job: Job, template: str) -> None:
    """``spec.model.chatTemplate``."""
    job.spec = job.spec.model_copy(update={"model": job.spec.model.model_copy(update={"chat_template": template})})


def log_of(job: Job, result: Manifest) -> dict[str, Any]:
    """``quantize.json``."""
    content: dict[str, Any] = json.loads((job.files(result) / "quantize.json").read_text())
    return content


def test_every_type_is_written_described_and_close_to_the_model(make_job: JobMaker, random_model: Path) -> None:
    """All eight types in one run: real K types where rows allow them, recorded as they are in the files."""
    types = ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    job = job_for(make_job, random_model, *types)
    result = job.run("gguf")
    files, log = job.files(result), log_of(job, result)
    assert {a.name for a in result.artifacts} == {*types, "Modelfile"}
    assert set(result.outputs) == {*(f"gguf/{t}" for t in types), "log"}
    assert log["conversion"]["type"] == "bf16"
    for kind in types:
        said = log["types"][kind]
        path = files / said["file"]
        assert path.name == f"tiny-{kind}.gguf"
        head = metadata.read(path)
        assert head.fields["general.name"] == "tiny"
        assert said["sizeBytes"] == path.stat().st_size
        assert said["sha256"] == next(a.sha256 for a in result.artifacts if a.name == kind)
        assert said["tensorTypes"] == {name: tensor.type for name, tensor in head.tensors.items()}
        assert said["kl"] == result.figures[f"kl{kind}"]
        assert said["prompts"] == len(QUESTIONS)
        assert said["differences"] == []
    assert log["types"]["Q4_K_M"]["tensorTypes"]["blk.0.ffn_up.weight"] == "Q4_K"
    assert log["types"]["Q2_K"]["tensorTypes"]["blk.0.ffn_up.weight"] == "Q2_K"
    sizes = {kind: log["types"][kind]["bitsPerWeight"] for kind in types}
    assert (
        sizes["F16"]
        == sizes["BF16"]
        > sizes["Q8_0"]
        > sizes["Q6_K"]
        > sizes["Q5_K_M"]
        > sizes["Q4_K_M"]
        > sizes["Q2_K"]
    )
    assert log["types"]["F16"]["kl"] < 1e-4 < log["types"]["Q2_K"]["kl"]


def test_figures_are_what_transformers_and_the_file_give(make_job: JobMaker, random_model: Path) -> None:
    """Mean KL divergence and top-1 agreement on the answers, computed again without our comparison."""
    job = job_for(make_job, random_model, "Q4_K_M")
    result = job.run("gguf")
    log = log_of(job, result)
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    divergences, same, contradicted = [], [], []
    with GGUFModel(job.files(result) / "tiny-Q4_K_M.gguf") as gguf:
        for row in rows():
            asked = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(asked)["input_ids"]
            answer = tokenizer(row["messages"][1]["content"] + "<|im_end|>")["input_ids"]
            (found,) = gguf.answer_logprobs([(prompt, answer)])
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
            wanted = logits.log_softmax(-1).numpy()
            divergences += (np.exp(wanted) * (wanted - found)).sum(-1).tolist()
            agreed = wanted.argmax(-1) == found.argmax(-1)
            same += agreed.tolist()
            contradicted += (~agreed & (wanted.max(-1) > np.log(0.5))).tolist()
    said = log["types"]["Q4_K_M"]
    assert said["klStandardError"] == pytest.approx(np.std(divergences) / len(divergences) ** 0.5, rel=0.02)
    assert said["answerTokens"] == len(divergences) == log["reference"]["answerTokens"]
    assert said["kl"] == pytest.approx(np.mean(divergences), rel=0.02)
    assert said["top1"] == pytest.approx(np.mean(same))
    assert said["top1Sure"] == pytest.approx(1 - np.mean(contradicted))


def test_smollm2_stops_and_answers_from_its_gguf(make_job: JobMaker, smollm2: Path) -> None:
    """The quickstart's model as Q8_0: inside the bounds, ends its answers, a Modelfile with its turns."""
    test = [r | {"messages": [r["messages"][0], {"role": "assistant", "content": "Sure! Here it is."}]} for r in rows()]
    job = job_for(make_job, smollm2, "Q8_0", test=test, evaluation={"maxNewTokens": 40})
    result = job.run("gguf")
    said = log_of(job, result)["types"]["Q8_0"]
    assert said["stop"]["token"] == "<|im_end|>"
    assert said["stop"]["endsGeneration"]
    assert said["stop"]["finished"] >= 1
    assert 1e-4 < said["kl"] < 1e-2
    assert said["tensors"] == {"Q8_0": 211, "F32": 61}
    assert said["bitsPerWeight"] == pytest.approx(8.506, abs=0.001)
    text = (job.files(result) / "Modelfile").read_text()
    assert "FROM ./tiny-Q8_0.gguf" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""' in text
    # Its BOS is <|im_start|>, and nobody adds it: it belongs to the first turn as to every other.
    for role in ("system", "user", "assistant"):
        assert rf'{{{{ "<|im_start|>{role}\n" }}}}{{{{ .Content }}}}{{{{ "<|im_end|>\n" }}}}' in text


def test_damaged_weights_fail_the_stage(
    make_job: JobMaker, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GGUF of other weights than the model's is refused with its figures; the type that is right is not blamed."""
    right = gguf_quantize.quantize

    def wrong(source: Path, destination: Path, kind: str, *matrix: Any) -> None:
        right(source, destination, "Q2_K" if kind == "Q4_K_M" else kind, *matrix)

    monkeypatch.setattr(quantize, "quantize", wrong)
    job = job_for(make_job, random_model, "Q8_0", "Q4_K_M")
    with pytest.raises(ConfigurationError, match=r"pipeline\[0\].quantize.gguf\[1\]: Q4_K_M (mean KL|top-1)") as caught:
        job.run("gguf")
    assert "Q8_0" not in str(caught.value)


def test_a_file_that_llama_cpp_cannot_read_names_its_type(
    make_job: JobMaker, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its converter may know a model of which llama.cpp itself cannot load this kind: no input is missing then."""
    monkeypatch.setattr(quantize, "quantize", lambda source, target, *_: target.write_bytes(source.read_bytes()[:4096]))
    with pytest.raises(
        ConfigurationError, match=r"gguf\[0\]: Q8_0 .* cannot be read by llama.cpp .*; leave the stage out"
    ):
        job_for(make_job, random_model, "Q8_0").run("gguf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.replace("<|im_start|>assistant", "<|im_start|>model"),
            "renders the prompt otherwise from character",
        ),
        (lambda t: "{{ raise_exception('no') }}", "refuses the conversation: no"),
        (None, "has no chat template"),
    ],
    ids=["other", "refusing", "lost"],
)
def test_other_prompt_in_the_gguf_fails_the_stage(
    make_job: JobMaker, random_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Any, words: str
) -> None:
    """A template that was changed or lost on the way is noticed, whatever the probabilities."""
    other = tmp_path / "other"
    shutil.copytree(random_model, other)
    template = other / "chat_template.jinja"
    if change is None:
        template.unlink()
    else:
        template.write_text(change(template.read_text()))
    monkeypatch.setattr(quantize, "_with_template", lambda ctx, model, tokenizer: other)
    with pytest.raises(ConfigurationError, match=words):
        job_for(make_job, random_model, "F16").run("gguf")


def test_gguf_that_cannot_stop_fails_the_stage(make_job: JobMaker, random_model: Path) -> None:
    """A template that closes turns with a token at which llama.cpp does not stop gives a GGUF that nobody can use."""
    job = job_for(make_job, random_model, "F16")
    set_template(job, "{% for m in messages %}{{ m.content }}<jupyter_code>{% endfor %}")
    with pytest.raises(ConfigurationError, match="does not end an answer at '<jupyter_code>'"):
        job.run("gguf")


def test_chat_template_of_the_job_goes_into_the_gguf(make_job: JobMaker, random_model: Path) -> None:
    """``spec.model.chatTemplate`` replaces the model's own, in the file and in the comparison."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}[assistant]"
    job = job_for(make_job, random_model, "F16")
    set_template(job, template)
    result = job.run("gguf")
    assert metadata.read(job.files(result) / "tiny-F16.gguf").fields["tokenizer.chat_template"] == template
    assert log_of(job, result)["types"]["F16"]["prompts"] == len(QUESTIONS)


@pytest.mark.parametrize("own", ["", "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"])
def test_the_gguf_has_the_template_that_transformers_reads(
    make_job: JobMaker, random_model: Path, tmp_path: Path, own: str
) -> None:
    """Of two templates in a model's files the converter would take the other one; the job's own goes over both."""
    model = tmp_path / "two-templates"
    shutil.copytree(random_model, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    written = json.dumps({**config, "chat_template": "{{ messages[0].content }}"})
    (model / "tokenizer_config.json").write_text(written)
    job = job_for(make_job, model, "F16")
    set_template(job, own)
    fields = metadata.read(job.files(job.run("gguf")) / "tiny-F16.gguf").fields
    assert fields["tokenizer.chat_template"] == (own or (model / "chat_template.jinja").read_text())
    assert (model / "tokenizer_config.json").read_text() == written


@pytest.mark.parametrize("test", [[], [{"id": "a", "source": "t", "line": 1, "prompt": "Once", "completion": " upon"}]])
def test_model_without_chat_template_is_compared_honestly(
    make_job: JobMaker, random_model: Path, tmp_path: Path, test: list[dict[str, Any]]
) -> None:
    """No prompt is claimed to be rendered alike; ids and probabilities are compared, on built-in texts if need be."""
    plain = tmp_path / "plain"
    shutil.copytree(random_model, plain)
    (plain / "chat_template.jinja").unlink()
    job = job_for(make_job, plain, "Q8_0", test=test)
    result = job.run("gguf")
    log = log_of(job, result)
    said = log["types"]["Q8_0"]
    assert said["prompts"] == "the model has no chat template"
    assert said["texts"] > len(parity.PROBES) - (not test)
    assert said["stop"]["answers"] == len(test)
    assert log["reference"]["source"].startswith("test rows" if test else "built-in texts")
    assert "\nTEMPLATE" not in (job.files(result) / "Modelfile").read_text()


def test_bound_of_the_job_is_fatal_only_where_the_job_says_so(make_job: JobMaker, random_model: Path) -> None:
    """``maxGGUFDivergence`` is a gate of the evaluation: it stops this stage only with ``failJob``."""
    gates = {"maxGGUFDivergence": {"Q2_K": 1e-6}}
    job = job_for(make_job, random_model, "Q2_K", evaluation={"gates": gates})
    assert log_of(job, job.run("gguf"))["types"]["Q2_K"]["bounds"]["maxGGUFDivergence"] == 1e-6
    strict = job_for(make_job, random_model, "Q2_K", evaluation={"gates": {**gates, "failJob": True}})
    with pytest.raises(ConfigurationError, match=r"at most 1e-06 by spec.evaluation.gates.maxGGUFDivergence"):
        strict.run("gguf")


class _StopAt(Stop):
    """Told to stop just before the ``n``-th time that the stage looks."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self._left = n

    def check(self) -> None:
        """Count down."""
        self._left -= 1
        if self._left == 0:
            self.request()
        super().check()


@pytest.mark.parametrize("asked", [2, 12])
def test_told_to_stop_it_stops_with_nothing_committed(make_job: JobMaker, random_model: Path, asked: int) -> None:
    """SIGTERM ends the stage between its parts and rows; the next attempt starts anew and succeeds."""
    job = job_for(make_job, random_model, "Q8_0")
    with pytest.raises(PreemptedError):
        job.run("gguf", _StopAt(asked))
    assert [o.key for o in job.store.list(f"{job.store.prefix}/default/tiny/gguf/")] == []


def test_short_disk_is_said_before_anything_is_written(
    make_job: JobMaker, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room needed and the room there is, in words; nothing of the result is there."""
    real, work = shutil.disk_usage, tmp_path / "work"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000) if path == work else real(path))
    with pytest.raises(StageError, match=r"0.0 GiB free and Q8_0 of this model need 0\.\d GiB"):
        job_for(make_job, random_model, "Q8_0").run("gguf", workspace=work)
    assert not list(work.rglob("*.gguf"))


def test_disk_is_reckoned_with_the_converted_size(
    make_job: JobMaker, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One float32 tensor among bfloat16 ones makes the whole conversion float32, twice the size of the model's file."""
    model, work, real = tmp_path / "mixed", tmp_path / "work", shutil.disk_usage
    shutil.copytree(random_model, model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    count = sum(tensor.numel() for tensor in weights.values())
    free = parity.reference_bytes(49152) + 4 * count  # the conversion alone takes it
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free) if path == work else real(path))
    with pytest.raises(StageError, match="Q2_K of this model need"):
        job_for(make_job, model, "Q2_K").run("gguf", workspace=work)


def test_no_more_disk_is_asked_for_than_is_taken(
    make_job: JobMaker, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the conversion, the type and 400 answer tokens' probabilities is enough, and those take just theirs."""
    work, real = tmp_path / "work", shutil.disk_usage
    weights = 2 * sum(tensor.numel() for tensor in load_file(random_model / "model.safetensors").values())
    room = 400 * 49152 * 4
    free = int(weights * (1 + 1.1)) + room + 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free) if path == work else real(path))
    job = job_for(make_job, random_model, "BF16", test=rows("many words " * 60 + "{}"))
    log = log_of(job, job.run("gguf", workspace=work))
    assert log["reference"]["answerTokens"] == 400
    assert (work / "reference.f32").stat().st_size == room


def test_unknown_tokenizer_is_refused_in_words(make_job: JobMaker, tiny_model: Path) -> None:
    """The converter's own refusal becomes a final error that says what it is about."""
    with pytest.raises(
        ConfigurationError, match=r"its tokenizer splits text in a way that this llama.cpp does not know"
    ):
        job_for(make_job, tiny_model, "F16").run("gguf")


def test_padded_vocabulary_is_kept(make_job: JobMaker, smollm2: Path, tmp_path: Path) -> None:
    """An embedding taller than the tokenizer's vocabulary converts and compares."""
    from tests.stages.gguf_models import write_random

    model = write_random(tmp_path / "padded", smollm2, vocab_size=49152 + 64)
    assert len(load_tokenizer(model)) == 49152
    job = job_for(make_job, model, "F16")
    head = metadata.read(job.files(job.run("gguf")) / "tiny-F16.gguf")
    assert len(head.fields["tokenizer.ggml.tokens"]) == head.tensors["token_embd.weight"].shape[0] == 49216
    assert all((model / name).is_file() for name in TOKENIZER_FILES)


def test_adapter_without_merge_is_refused(make_job: JobMaker, random_model: Path) -> None:
    """A GGUF is made of whole weights: the words name the field and the mend."""
    job = job_for(make_job, random_model, "F16")
    pipeline = [{"name": "sft", "sft": {}}, {"name": "gguf", "quantize": {"gguf": ["F16"]}}]
    job.spec = type(job.spec).model_validate_json(
        json.dumps({**job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True), "pipeline": pipeline})
    )
    with pytest.raises(
        ConfigurationError, match=r"spec.pipeline\[1\].quantize: stage sft leaves an adapter; put a merge"
    ):
        job.run("gguf")
