"""Tokens that a job adds to its model."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.stages import families
from tests.stages.families import FAMILIES
from tests.stages.test_architectures import converter_knows as converter_knows
from tests.stages.test_architectures import difference, logits, original
from tests.stages.training_job import JobMaker, Row, chat_rows
from transformers import AutoModelForCausalLM

from finetune_api.types import Method, ModelSource
from finetune_jobs import anatomy, models
from finetune_jobs.data.encode import encode, load_tokenizer
from finetune_jobs.gguf.engine import GGUFModel
from finetune_jobs.gguf.rehearsal import rehearse
from finetune_jobs.run.errors import ConfigurationError
from finetune_jobs.training.model import load
from finetune_jobs.training.weights import save_trained
from finetune_jobs.vocabulary import add_tokens, unreadable

EMBEDDING = "base_model.model.model.embed_tokens.weight"
TOKENS = ["<part>", "[[end of part]]"]


def rows_with_tokens(count: int, seed: int = 0) -> list[Row]:
    """Answers in which the new tokens stand."""
    rows = chat_rows(count, seed)
    for row in rows:
        row["messages"][1]["content"] = f"<part>{row['messages'][1]['content']}[[end of part]]"
    return rows


@pytest.mark.parametrize("name", ["qwen2", "llama3", "gemma2"], ids=["tied", "untied", "tied, SentencePiece"])
def test_new_tokens_are_learned_and_reach_the_gguf(
    make_job: JobMaker, tmp_path: Path, converter_knows: Any, name: str
) -> None:
    """Rows begin as the mean, are trained with embedding and head, and stay what they are through merge and GGUF: the
    same ids, the same probabilities, and one matrix where there was one."""
    family = FAMILIES[name]
    converter_knows(family.pre)
    base = families.write(family, tmp_path / "model")
    first = {key: tensor.float() for key, tensor in load_file(base / "model.safetensors").items()}
    before = load_tokenizer(base)
    used = len(before)
    add_tokens(base, TOKENS)
    tokenizer = load_tokenizer(base)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [used, used + 1]
    assert tokenizer("a<part>b", add_special_tokens=False)["input_ids"][1] == used
    assert tokenizer("Say abc", add_special_tokens=False) == before("Say abc", add_special_tokens=False)
    raised = load_file(base / "model.safetensors")
    tables = [key for key in raised if "embed_tokens" in key or "lm_head" in key]
    for key, tensor in raised.items():
        wanted = first[key].clone()
        if key in tables:
            wanted = torch.cat([wanted, wanted.new_zeros(max(0, used + 2 - len(wanted)), wanted.shape[1])])
            wanted[used : used + 2] = first[key][:used].double().mean(0).to(torch.bfloat16).float()
        assert torch.equal(tensor.float(), wanted), key

    training = {"batchSize": 2, "maxSteps": 2, "warmupRatio": 0, "learningRate": 5e-3, "precision": "fp32"}
    lora = {"r": 4, "modulesToSave": ["embed_tokens", "lm_head"]}
    stages = [
        {"name": "sft", "sft": {"lora": lora, "training": training}},
        {"name": "merge", "merge": {"dtype": "float32"}},
        {"name": "gguf", "quantize": {"gguf": ["F16"]}},
    ]
    test = rows_with_tokens(2, seed=1)
    job = make_job(
        {"train": rows_with_tokens(4), "eval": test, "test": test}, model=base, pipeline=stages,
        evaluation={"skip": True, "maxNewTokens": 4},
    )  # fmt: skip
    adapter = job.files(job.run("sft")) / "adapter"
    merged = job.files(job.run("merge")) / "model"
    written = load_file(merged / "model.safetensors")
    assert ("lm_head.weight" in written) is (name == "llama3")
    for key in tables:
        assert not torch.equal(written[key][used], written[key][used + 1]), "they have learned nothing"
    tuned = PeftModel.from_pretrained(original(base), str(adapter))
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    encoded: Any = encode(test[0], tokenizer, loss_on="completion", max_length=512, overlong="drop")
    assert {used, used + 1} < set(encoded.input_ids)
    wanted = logits(model, encoded.input_ids)
    assert difference(wanted, logits(tuned, encoded.input_ids)) <= 1e-5
    files = job.files(job.run("gguf"))
    assert json.loads((files / "quantize.json").read_text())["types"]["F16"]["differences"] == []
    start = encoded.supervised.index(True)
    with GGUFModel(files / "tiny-F16.gguf") as gguf:
        assert gguf.tokenize(test[0]["messages"][1]["content"])[-1] == used + 1
        (found,) = gguf.answer_logprobs([(encoded.input_ids[:start], encoded.input_ids[start:])])
    logs = wanted[start - 1 : -1].log_softmax(-1)
    assert float((logs.exp() * (logs - torch.from_numpy(found).double())).sum(-1).mean()) < 1e-4


def test_the_users_own_files_stay_as_they_are(tmp_path: Path) -> None:
    """The workspace's are links to them; a model in shards keeps them, and loads with the new rows."""
    source = families.write(FAMILIES["llama3"], tmp_path / "source")
    network = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    network.save_pretrained(source, max_shard_size="1MB")
    linked = tmp_path / "linked"
    linked.mkdir()
    kept = {path.name: path.read_bytes() for path in source.iterdir()}
    for number, path in enumerate(sorted(source.iterdir())):
        (os.link if number % 2 else os.symlink)(path, linked / path.name)
    add_tokens(linked, [f"<{n}>" for n in range(40)])
    assert {path.name: path.read_bytes() for path in source.iterdir()} == kept
    assert {path.name for path in linked.iterdir()} == kept.keys()
    rows = AutoModelForCausalLM.from_pretrained(linked).get_input_embeddings().weight.shape[0]
    assert rows == len(load_tokenizer(linked)) > network.get_input_embeddings().weight.shape[0]


def test_prepare_gets_a_model_with_them(make_job: JobMaker, tmp_path: Path, converter_knows: Any) -> None:
    """What is committed has the tokens, whole weights and a tokenizer that llama.cpp reads alike."""
    converter_knows("qwen2")
    source = families.write(FAMILIES["qwen2"], tmp_path / "source")
    used = len(load_tokenizer(source))
    kept = {path.name: path.read_bytes() for path in source.iterdir()}
    storage = make_job({}, pipeline=[{"name": "sft", "sft": {}}]).spec.storage
    base = models.resolve(ModelSource(source=f"file://{source}", add_tokens=TOKENS), storage, tmp_path / "resolved")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == kept
    assert {path.name for path in base.directory.iterdir()} == kept.keys()
    assert {file["name"] for file in base.record["files"]} == kept.keys()
    body = anatomy.anatomy(anatomy.load_config(base.directory, trust_remote_code=False))
    tokenizer = load_tokenizer(base.directory)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [used, used + 1]
    anatomy.check_tokenizer(tokenizer, base.directory, body)
    anatomy.check_weights(base.directory, body.parameters)
    tokenizer.chat_template = f"{{{{ messages[0].content }}}}{TOKENS[0]}{TOKENS[1]}<|im_end|>"
    assert rehearse(base.directory, tokenizer, tmp_path / "rehearsal").refusals == []


def test_a_model_from_elsewhere_gets_them_where_it_is_fetched(
    make_job: JobMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record names them, every stage adds them to its own copy, once."""
    source = families.write(FAMILIES["qwen2"], tmp_path / "source")
    monkeypatch.setattr(models, "_snapshot", lambda *args, **more: sorted(source.iterdir()))
    record = {"kind": "hub", "repository": "a/b", "revision": "c", "trustRemoteCode": False, "chatTemplate": ""}
    storage = make_job({}, pipeline=[{"name": "sft", "sft": {}}]).spec.storage
    for _ in range(2):
        directory = models.fetch({**record, "addTokens": TOKENS}, tmp_path / "base", storage)
    assert load_tokenizer(directory).convert_ids_to_tokens([len(load_tokenizer(source))]) == ["<part>"]


def test_a_token_that_is_there_already_is_refused(tmp_path: Path) -> None:
    """With its place in the list."""
    base = families.write(FAMILIES["qwen2"], tmp_path / "model")
    with pytest.raises(ConfigurationError, match=r"addTokens\[1\]: '<\|im_end\|>' is a token of the model"):
        add_tokens(base, ["<part>", "<|im_end|>"])


def test_a_token_that_would_not_come_back_is_refused(tmp_path: Path, converter_knows: Any) -> None:
    """A byte-level tokenizer takes letters such as ß for bytes, in answers and in the GGUF; SentencePiece does not."""
    tokens = ["<part>", "Straße", "東京"]
    words = {}
    for name in ("qwen2", "gemma2"):
        converter_knows(FAMILIES[name].pre)
        base = families.write(FAMILIES[name], tmp_path / name)
        add_tokens(base, tokens)
        tokenizer = load_tokenizer(base)
        words[name] = list(unreadable(tokenizer, tokens))
        refusals = rehearse(base, tokenizer, tmp_path / f"rehearsal-{name}", tokens).refusals
        assert len(refusals) == len(words[name])
        assert all("'a Straßeb Straße' is" in refusal and "model, from token" in refusal for refusal in refusals)
    assert words["gemma2"] == []
    assert len(words["qwen2"]) == 1
    assert words["qwen2"][0].startswith(
        "spec.model.addTokens[1]: the model's tokenizer would write 'Straße' as 'Stra\ufffde'"
    )


def test_what_was_trained_whole_is_loaded_unrounded(make_job: JobMaker, tmp_path: Path) -> None:
    """Into a model in bfloat16, of which PEFT makes copies for it: the next stage goes on from what was saved."""
    base = families.write(FAMILIES["llama3"], tmp_path / "model")
    training = {"batchSize": 2, "maxSteps": 1, "warmupRatio": 0, "learningRate": 1e-4, "precision": "fp32"}
    lora = {"r": 4, "modulesToSave": ["embed_tokens", "lm_head", "norm"]}
    stages = [{"name": "sft", "sft": {"lora": lora, "training": training}}]
    job = make_job({"train": chat_rows(4)}, model=base, pipeline=stages)
    adapter = job.files(job.run("sft")) / "adapter"
    policy = load(
        base, method=Method.LORA, lora=None, quantization=None, adapter=adapter, compute=torch.bfloat16,
        device=torch.device("cpu"), seed=0,
    )  # fmt: skip
    save_trained(policy, tmp_path / "again")
    saved, again = (
        load_file(directory / "adapter_model.safetensors") for directory in (adapter, tmp_path / "again" / "adapter")
    )
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert not torch.equal(saved[EMBEDDING], saved[EMBEDDING].bfloat16().float())
