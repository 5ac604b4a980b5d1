"""The families that people fine-tune, each from its checkpoint to a GGUF that answers like the tuned model."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import load_file
from tests.stages import families
from tests.stages.families import FAMILIES
from tests.stages.test_prepare import Job as PrepareJob
from tests.stages.test_prepare import Prepared
from tests.stages.test_quantized import KINDS, quantized
from tests.stages.training_job import JobMaker, Row, chat_rows, pair_rows
from tests.store.conftest import BUCKET, EmbeddedStore
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, OPTConfig, OPTForCausalLM

from finetune_api.types import Quantization
from finetune_jobs import anatomy
from finetune_jobs.data.encode import encode, load_tokenizer
from finetune_jobs.gguf import convert, metadata, rehearsal, release
from finetune_jobs.gguf.engine import GGUFModel
from finetune_jobs.merging.dequantize import write_dequantized
from finetune_jobs.run.errors import ConfigurationError
from finetune_jobs.run.preemption import Stop
from finetune_jobs.store.client import Store

RANK = 4
NAMES = sorted(FAMILIES)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each family's model in a folder of its name."""
    root = tmp_path_factory.mktemp("families")
    for name, family in FAMILIES.items():
        families.write(family, root / name)
    return root


@pytest.fixture
def converter_knows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tell the converter the rules of a byte-level tokenizer: it knows one by a hash of what the family's whole
    vocabulary makes of a text, which a tiny one cannot give."""
    release.gguf_py()
    monkeypatch.syspath_prepend(str(release.directory()))
    base: Any = importlib.import_module("conversion.base")
    sys.path.remove(str(release.directory()))

    def tell(pre: str) -> None:
        if pre:
            monkeypatch.setattr(base.TextModel, "get_vocab_base_pre", lambda self, tokenizer: pre)

    return tell


def long_rows(count: int, seed: int) -> list[Row]:
    """Answers longer than every window of the table."""
    rows = chat_rows(count, seed)
    for row in rows:
        row["messages"][1]["content"] = " ".join([row["messages"][1]["content"]] * 12)
    return rows


def pipeline(**quantize: Any) -> list[dict[str, Any]]:
    """Two large steps of lora, a merge that rounds nothing, and GGUFs."""
    training = {"batchSize": 2, "maxSteps": 2, "warmupRatio": 0, "learningRate": 5e-3, "precision": "fp32"}
    return [
        {"name": "sft", "sft": {"lora": {"r": RANK}, "training": training}},
        {"name": "merge", "merge": {"dtype": "float32"}},
        {"name": "gguf", "quantize": {"gguf": ["F16", "Q8_0", "Q4_K_M"], **quantize}},
    ]


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary)."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0].double()
    return found


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative L2."""
    return float((found - wanted).norm() / wanted.norm())


def adapted_shapes(model: Path, leave: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Of the matrices in the file that lora adapts by ``all-linear``."""
    with safe_open(model / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    return [shape for name, shape in shapes.items() if len(shape) == 2 and not any(part in name for part in leave)]


@pytest.mark.parametrize("name", NAMES)
def test_from_checkpoint_to_gguf(make_job: JobMaker, checkpoints: Path, converter_knows: Any, name: str) -> None:
    """sft, merge and quantize of a family: lora's parameters are r (in + out) of every linear layer but head, experts
    and router; the merged model's logits are those of base and adapter to 1e-5, on texts longer than its window; the
    F16 GGUF's probabilities are the merged model's; Q8_0 and Q4_K_M are what they say and pass the stage's bounds."""
    family, base = FAMILIES[name], checkpoints / name
    converter_knows(family.pre)
    tokenizer = load_tokenizer(base)
    found = rehearsal.rehearse(base, tokenizer, base.parent / f"rehearsal-{name}")
    assert found == rehearsal.Rehearsal([], 48 if family.short else None)
    evaluation = long_rows(2, seed=1)
    test = chat_rows(3, seed=2) if family.short else evaluation
    job = make_job(
        {"train": chat_rows(4), "eval": evaluation, "test": test}, model=base, pipeline=pipeline(),
        evaluation={"skip": True, "maxNewTokens": 4},
    )  # fmt: skip

    trained = job.run("sft")
    formula = sum(RANK * sum(shape) for shape in adapted_shapes(base, family.heads))
    assert trained.figures["trainableParameters"] == formula
    merged = job.files(job.run("merge")) / "model"
    tuned = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(tuned, str(job.files(trained) / "adapter")).eval()
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    encoded: Any = encode(evaluation[0], tokenizer, loss_on="auto", max_length=512, overlong="drop")
    wanted = logits(model, encoded.input_ids)
    assert len(wanted) > 60
    assert difference(wanted, logits(tuned, encoded.input_ids)) <= 1e-5
    with tuned.disable_adapter():
        assert difference(wanted, logits(tuned, encoded.input_ids)) > 1e-2
    if family.off:
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, **family.off).eval()
        assert difference(logits(plain, encoded.input_ids), wanted) > 1e-2

    result = job.run("gguf")
    files = job.files(result)
    log = json.loads((files / "quantize.json").read_text())["types"]
    kinds = {tensor.type for tensor in metadata.read(files / "tiny-Q4_K_M.gguf").tensors.values()}
    assert "Q4_K" in kinds
    assert log["F16"]["prompts"] == len(test)
    encoded = encode(test[0], tokenizer, loss_on="completion", max_length=512, overlong="drop")
    start = encoded.supervised.index(True)
    wanted = logits(model, encoded.input_ids[:-1])[start - 1 :].log_softmax(-1)
    with GGUFModel(files / "tiny-F16.gguf") as gguf:
        (found,) = gguf.answer_logprobs([(encoded.input_ids[:start], encoded.input_ids[start:])])
    kl = (wanted.exp() * (wanted - torch.from_numpy(found).double())).sum(-1)
    assert float(kl.quantile(0.9) if family.experts else kl.mean()) < 1e-4
    assert log["F16"]["kl"] < log["Q4_K_M"]["kl"]
    assert log["F16"]["kl"] - 2 * log["F16"]["klStandardError"] * family.experts < 1e-4 < log["Q4_K_M"]["kl"]


def squares(checkpoint: Path, router: str, expert: str, parts: tuple[str, str, str], rows: list[Row]) -> Any:
    """By block, expert and part: mean squares of what meets the weight, from the files' tensors and the definition of
    a mixture of experts; and how many tokens were sent there."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    met: dict[int, list[torch.Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _, inputs, block=number: met.setdefault(block, []).append(inputs[0][0].double())
        )
    tokenizer = load_tokenizer(checkpoint)
    for row in rows:
        encoded: Any = encode(row, tokenizer, loss_on="all", max_length=512, overlong="drop")
        logits(model, encoded.input_ids)
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        found = {}
        for block, states in met.items():
            x = torch.cat(states)
            scores = x @ file.get_tensor(router.format(block)).double().T
            sent = scores.topk(2, dim=-1).indices
            for number in range(scores.shape[1]):
                own = x[(sent == number).any(-1)]
                gate, up, _ = (file.get_tensor(expert.format(block, number, part)).double() for part in parts)
                inner = torch.nn.functional.silu(own @ gate.T) * (own @ up.T)
                found[block, number] = (own.square().mean(0), inner.square().mean(0), len(own))
    return found


@pytest.mark.parametrize(
    ("name", "router", "expert", "parts"),
    [
        ("qwen3moe", "model.layers.{}.mlp.gate.weight", "model.layers.{}.mlp.experts.{}.{}.weight",
         ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "model.layers.{}.block_sparse_moe.gate.weight",
         "model.layers.{}.block_sparse_moe.experts.{}.{}.weight", ("w1", "w3", "w2")),
    ],
    ids=["qwen3moe", "mixtral"],
)  # fmt: skip
def test_each_expert_has_an_importance_matrix_of_its_own(
    make_job: JobMaker,
    checkpoints: Path,
    converter_knows: Any,
    name: str,
    router: str,
    expert: str,
    parts: tuple[str, str, str],
) -> None:
    """Over the tokens that were sent to it; with them llama.cpp writes a type that it makes of no weight without."""
    converter_knows(FAMILIES[name].pre)
    rows = chat_rows(4)
    stages = [{"name": "gguf", "quantize": {"gguf": ["IQ2_XS"]}}]
    roles = {"train": rows, "test": chat_rows(2, seed=3)}
    job = make_job(roles, model=checkpoints / name, pipeline=stages, evaluation={"skip": True, "maxNewTokens": 4})
    files = job.files(job.run("gguf"))
    log = json.loads((files / "quantize.json").read_text())
    assert log["imatrix"]["without"] == []
    assert log["types"]["IQ2_XS"]["tensorTypes"]["blk.0.ffn_up_exps.weight"] == "IQ2_XS"
    file = release.gguf_py().GGUFReader(files / "imatrix.gguf")
    written = {tensor.name: np.array(tensor.data) for tensor in file.tensors}
    for (block, number), (into, inner, count) in squares(checkpoints / name, router, expert, parts, rows).items():
        for part, wanted in (("gate", into), ("up", into), ("down", inner)):
            tensor = f"blk.{block}.ffn_{part}_exps.weight"
            assert written[f"{tensor}.counts"][number] == count
            assert written[f"{tensor}.in_sum2"][number] / count == pytest.approx(wanted.numpy(), rel=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "qwen3moe"])
def test_first_dpo_loss_is_that_of_no_preference(make_job: JobMaker, checkpoints: Path, name: str) -> None:
    """ln 2, since the reference is the incoming model, by the same attention and the same experts: cached, then run
    again in batches of other lengths."""
    training = {"batchSize": 4, "maxSteps": 1, "learningRate": 1e-3, "precision": "fp32", "loggingSteps": 1}
    stages = [{"name": "dpo", "preference": {"loss": "dpo", "lora": {"r": RANK}, "training": training}}]
    job = make_job({"preference": pair_rows(4)}, model=checkpoints / name, pipeline=stages)
    curve = job.log(job.run("dpo"))["curve"]
    assert curve[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "qwen3moe"])
def test_dequantized_base_is_the_one_that_was_trained(make_job: JobMaker, tmp_path: Path, name: str) -> None:
    """qlora of layers that are fused, turned (GPT-2 keeps them as (in, out), one of them square) or no linear layers at
    all: the merged model's logits are the adapter's on the 4-bit base, and not those on the original."""
    base = families.write(FAMILIES[name], tmp_path / "model", torch.float32)
    training = {"batchSize": 2, "maxSteps": 2, "warmupRatio": 0, "learningRate": 5e-3, "precision": "fp32"}
    block = {"method": "qlora", "lora": {"r": RANK}, "training": training}
    stages = [{"name": "sft", "sft": block}, {"name": "merge", "merge": {"base": "dequantized", "dtype": "float32"}}]
    job = make_job({"train": chat_rows(4), "eval": chat_rows(2, seed=1)}, model=base, pipeline=stages)
    adapter = job.files(job.run("sft")) / "adapter"
    model = AutoModelForCausalLM.from_pretrained(job.files(job.run("merge")) / "model", dtype=torch.float32)
    ids = list(range(5, 60))
    tuned = [PeftModel.from_pretrained(one, str(adapter)) for one in (quantized(base, "nf4"), original(base))]
    exact, other = (difference(logits(model, ids), logits(one, ids)) for one in tuned)
    assert exact <= 1e-5
    assert other > 1e-2


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_turned_layers_are_rounded_as_they_are_held(checkpoints: Path, tmp_path: Path, kind: str) -> None:
    """GPT-2's weights, raised again, are bit for bit what bitsandbytes' layers hold the other way round."""
    base = checkpoints / "gpt2"
    body = anatomy.anatomy(anatomy.load_config(base, trust_remote_code=False))
    assert body.turned == body.linear
    settings = Quantization.model_validate(KINDS[kind], strict=False)
    write_dequantized(base, tmp_path / "raised", settings, body.linear, 1 << 30, lambda: None, body.turned)
    plain, raised, held = original(base), original(tmp_path / "raised"), quantized(base, kind)
    if kind == "int8":
        logits(held, [1, 2, 3])  # its scales find their place when it is first run
    for name in body.linear:
        weight = dequantize_module_weight(held.get_submodule(name)).T.to(torch.bfloat16).float()
        torch.testing.assert_close(raised.get_submodule(name).weight, weight, rtol=2**-7, atol=1e-7)
        assert difference(weight, plain.get_submodule(name).weight.detach()) > 1e-4


def original(directory: Path) -> Any:
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


GGUF = {"name": "gguf", "from": "base", "quantize": {"gguf": ["Q8_0"]}}


@pytest.fixture
def prepared(store_server: EmbeddedStore, tmp_path: Path, converter_knows: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``prepare`` of a pipeline with GGUFs on a model."""
    store = Store(
        bucket=BUCKET, prefix="families", endpoint=store_server.endpoint, access_key=store_server.access_key,
        secret_key=store_server.secret_key,
    )  # fmt: skip

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", store_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store_server.secret_key)

    def run(
        model: Path, rows: list[Row], *stages: Any, pre: str = "", template: str = "", uploaded: bool = False
    ) -> Prepared:
        converter_knows(pre)
        job = PrepareJob(tmp_path, model, store, Stop())
        bare = [{"messages": row["messages"]} for row in rows]
        if uploaded:
            for path in model.iterdir():
                store.put_file(path, f"{store.prefix}/{model.name}/{path.name}")
        where = f"s3://{BUCKET}/{store.prefix}/{model.name}" if uploaded else f"file://{model}"
        source = {"source": where, "chatTemplate": template}
        return job.run(job.spec({"train": job.write("rows.jsonl", bare)}, *(stages or [GGUF]), model=source))

    return run


def test_prepare_passes_a_model_and_tells_of_a_window_that_llama_cpp_drops(prepared: Any, checkpoints: Path) -> None:
    """Phi-3's, where rows are longer; nothing is said where they are not."""
    said = "the model looks 48 tokens back, llama.cpp to the beginning"
    short, long = (prepared(checkpoints / "phi3", rows).card["warnings"] for rows in (chat_rows(6), long_rows(6, 1)))
    assert not any(said in words for words in short)
    assert any(said in words for words in long)
    warnings = prepared(checkpoints / "gemma2", long_rows(6, 1)).card["warnings"]
    assert not any("tokens back" in words for words in warnings)


def without(source: Path, directory: Path, file: str) -> Path:
    """A copy that lacks a file."""
    shutil.copytree(source, directory)
    (directory / file).unlink()
    return directory


def test_prepare_refuses_what_the_converter_will_refuse(
    prepared: Any, checkpoints: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """An architecture, a tokenizer and files that it does not know or miss: before training, with field and mend."""
    opt = OPTConfig(
        vocab_size=352, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2
    )
    shutil.copytree(tiny_model, tmp_path / "opt")
    OPTForCausalLM(opt).save_pretrained(tmp_path / "opt")
    field = r"spec\.pipeline\[0\]\.quantize\.gguf: llama\.cpp's converter "
    mend = "; leave the stage out, or choose another model"
    for model, words in (
        (tmp_path / "opt", f"does not know OPTForCausalLM, so there can be no GGUF of it{mend}"),
        (tiny_model, f"refuses the model: its tokenizer splits text in a way that this llama.cpp does not know{mend}"),
        (
            without(checkpoints / "gemma2", tmp_path / "gemma", "tokenizer.model"),
            "refuses the model: it needs the tokenizer.model of SentencePiece; copy that file from the original model",
        ),
    ):
        with pytest.raises(ConfigurationError, match=field + words):
            prepared(model, chat_rows(4))


@pytest.mark.parametrize("uploaded", [False, True])
def test_prepare_refuses_weights_that_the_converter_cannot_turn(
    prepared: Any, checkpoints: Path, tmp_path: Path, uploaded: bool
) -> None:
    """Falcon's queries share one head; it is told of as many as there are. Only shapes are looked at, here or away."""
    size = anatomy.read_config(checkpoints / "smollm")["vocab_size"]
    config = FalconConfig(vocab_size=size, hidden_size=96, num_hidden_layers=1, num_attention_heads=4, multi_query=True)
    shutil.copytree(checkpoints / "smollm", tmp_path / "falcon")
    FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    words = r"\[0\]\.quantize\.gguf: llama\.cpp's converter refuses the model: RuntimeError: shape .* is invalid"
    with pytest.raises(ConfigurationError, match=words):
        prepared(tmp_path / "falcon", chat_rows(4), pre="smollm", uploaded=uploaded)


def test_prepare_refuses_what_llama_cpp_would_read_or_end_otherwise(
    prepared: Any, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other token ids for a text, and a token at which it would not stop: the field is that of the mend."""
    closes = "{% for m in messages %}{{ m.content }}<|system|>{% endfor %}"
    words = r"does not end an answer at '<\|system\|>'.* let spec.model.chatTemplate close them with '<\|endoftext\|>'"
    with pytest.raises(ConfigurationError, match=words):
        prepared(checkpoints / "phi3", chat_rows(4), template=closes)
    other = without(checkpoints / "mistral", tmp_path / "other", "tokenizer.json")
    plain = json.loads((checkpoints / "mistral" / "tokenizer.json").read_text()) | {"normalizer": None}
    (other / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigurationError, match=r"gguf: llama\.cpp reads text otherwise .* in the GGUF, \[.* in the"):
        prepared(other, chat_rows(4))
    monkeypatch.setattr(convert, "_general_name", lambda model, name: name)
    with pytest.raises(ConfigurationError, match=r"reads text otherwise than the model's tokenizer: '<\|user\|>"):
        prepared(checkpoints / "phi3", chat_rows(4))


def test_prepare_refuses_a_tokenizer_model_of_another_model(prepared: Any, checkpoints: Path, tmp_path: Path) -> None:
    """Given to llama.cpp, it would end the process."""
    mixed = without(checkpoints / "mistral", tmp_path / "mixed", "tokenizer.model")
    shutil.copy(checkpoints / "gemma2" / "tokenizer.model", mixed)
    with pytest.raises(ConfigurationError, match=r"the tokenizer\.model of spec\.model\.source is another model's"):
        prepared(mixed, chat_rows(4))


@pytest.mark.parametrize(
    ("family", "block", "words"),
    [
        ("smollm", {"lora": {"bias": "all"}}, r"lora\.bias: the model has no biases to train; write none"),
        (
            "qwen2",
            {"lora": {"bias": "loraOnly", "targetModules": ["o_proj"]}},
            r"lora\.bias: its adapted layers have no",
        ),
        ("qwen2", {"lora": {"bias": "loraOnly"}}, None),
        (
            "gemma2",
            {"method": "prefixTuning"},
            r"prefixTuning\.virtualTokens: layers of this model look 16 tokens back",
        ),
        ("gemma2", {"method": "prefixTuning", "prefixTuning": {"virtualTokens": 8}}, None),
    ],
)
def test_prepare_refuses_what_the_layers_do_not_have(
    prepared: Any, checkpoints: Path, family: str, block: dict[str, Any], words: str | None
) -> None:
    """Biases, and a view that is longer than a prefix: known before a GPU is taken."""

    def run() -> None:
        prepared(checkpoints / family, chat_rows(4), {"name": "sft", "sft": block})

    if words is None:
        return run()
    with pytest.raises(ConfigurationError, match=r"^spec\.pipeline\[0\]\.sft\." + words):
        run()


def test_prepare_asks_which_layers_ia3_is_to_scale(prepared: Any, checkpoints: Path) -> None:
    """Where they are not known, as in a mixture of experts, whose linear layers are the attention's alone."""
    words = r"\[0\]\.sft\.ia3\.targetModules: which layers .* name them, of k_proj, o_proj, q_proj, v_proj$"
    with pytest.raises(ConfigurationError, match=words):
        prepared(checkpoints / "qwen3moe", chat_rows(4), {"name": "sft", "sft": {"method": "ia3"}})


def test_prepare_refuses_an_adapter_of_turned_weights_as_gguf(prepared: Any, checkpoints: Path) -> None:
    """GPT-2's: before training, not when it would be written."""
    stages = [{"name": "sft", "sft": {}}, {"name": "merge", "merge": {}}]
    adapter = {"name": "gguf", "quantize": {"gguf": ["Q8_0"], "loraGGUF": True}}
    with pytest.raises(ConfigurationError, match=r"spec\.pipeline\[2\]\.quantize\.loraGGUF: .* leave out loraGGUF"):
        prepared(checkpoints / "gpt2", chat_rows(4), *stages, adapter, pre="gpt-2")


@pytest.mark.parametrize("name", ["qwen3moe", "mixtral"])
def test_full_trains_experts_and_router_too(
    make_job: JobMaker, checkpoints: Path, converter_knows: Any, name: str
) -> None:
    """They are saved under the names that the checkpoint had, all changed, and become a GGUF that answers like them."""
    family = FAMILIES[name]
    converter_knows(family.pre)
    training = {"batchSize": 6, "maxSteps": 2, "warmupRatio": 0, "learningRate": 1e-3, "precision": "fp32"}
    stages = [{"name": "sft", "sft": {"method": "full", "training": training}}, {**GGUF, "from": "sft"}]
    roles = {"train": chat_rows(12), "test": chat_rows(2, seed=3)}
    job = make_job(roles, model=checkpoints / name, pipeline=stages, evaluation={"skip": True, "maxNewTokens": 4})
    trained = job.files(job.run("sft")) / "model"
    before, after = (load_file(path / "model.safetensors") for path in (checkpoints / name, trained))
    assert before.keys() == after.keys()
    sparse = [tensor for tensor in before if "expert" in tensor or ".gate." in tensor]
    assert len(sparse) == 2 * (1 + 3 * 4)
    changed = {tensor for tensor in sparse if not torch.equal(before[tensor], after[tensor])}
    assert changed >= {tensor for tensor in sparse if "expert" not in tensor}
    assert len(changed) > len(sparse) / 2  # all that a token was sent to
    log = json.loads((job.files(job.run("gguf")) / "quantize.json").read_text())["types"]["Q8_0"]
    assert log["kl"] - 2 * log["klStandardError"] <= 5e-3
