"""Every type that llama.cpp offers, and the importance matrix that some of them need."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.stages.gguf_models import random_gguf as random_gguf
from tests.stages.gguf_models import random_model as random_model
from tests.stages.gguf_models import smollm2 as smollm2
from tests.stages.test_quantize import log_of, rows
from tests.stages.training_job import Job, JobMaker
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.types import IMATRIX_TYPES, GGUFType
from finetune_jobs.data.encode import load_tokenizer
from finetune_jobs.estimate import Architecture, embedding_type, gguf_bytes, head_type, linear_type, read
from finetune_jobs.gguf import imatrix, metadata
from finetune_jobs.gguf.imatrix import ImportanceMatrix, hand_over
from finetune_jobs.gguf.library import api, listen
from finetune_jobs.gguf.quantize import BITS, file_type, quantize
from finetune_jobs.gguf.release import gguf_py
from finetune_jobs.run.errors import ConfigurationError, StageError

WORDS = ["north", "south", "a red boat", "seven", "bread and salt", "late in the evening", "Oslo", "never"]


def train(count: int = 12) -> list[dict[str, Any]]:
    """Conversations to measure on."""
    return [
        {
            "id": f"n{i}",
            "source": "train.jsonl",
            "line": i + 1,
            "messages": [
                {"role": "user", "content": f"Say {WORDS[i % len(WORDS)]}, {i} times."},
                {"role": "assistant", "content": f"{WORDS[i % len(WORDS)]} " * (1 + i % 3)},
            ],
        }
        for i in range(count)
    ]


def expected(model: Path, tokenizer: Any, used: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """By other means than hooks on linear layers: squares of what each block's parts are given, all in float64."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    sums: dict[str, Any] = {}
    tokens = 0

    def add(name: str, values: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + values.square().sum((0, 1)).numpy()

    for row in used:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        # Training ends a turn at its stop token; the line break after it is the template's.
        ids = tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]
        tokens += len(ids)
        with torch.no_grad():
            states = network(torch.tensor([ids]), output_hidden_states=True).hidden_states
            where = torch.arange(len(ids))[None]
            turn = network.model.rotary_emb(states[0], where)
            for i, layer in enumerate(network.model.layers):
                normed = layer.input_layernorm(states[i])
                for part in "qkv":
                    add(f"blk.{i}.attn_{part}.weight", normed)
                mixed = attention(layer.self_attn, normed, turn)
                add(f"blk.{i}.attn_output.weight", mixed)
                after = states[i] + mixed @ layer.self_attn.o_proj.weight.T
                normed = layer.post_attention_layernorm(after)
                add(f"blk.{i}.ffn_gate.weight", normed)
                add(f"blk.{i}.ffn_up.weight", normed)
                inner = layer.mlp.act_fn(normed @ layer.mlp.gate_proj.weight.T) * (normed @ layer.mlp.up_proj.weight.T)
                add(f"blk.{i}.ffn_down.weight", inner)
    return {name: values / tokens for name, values in sums.items()}, tokens


def attention(part: Any, normed: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Causal attention with grouped heads, written out."""
    heads = [
        (normed @ weight.T).unflatten(-1, (-1, part.head_dim)).transpose(1, 2)
        for weight in (part.q_proj.weight, part.k_proj.weight, part.v_proj.weight)
    ]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * turn[0][:, None] + torch.cat([-b, a], -1) * turn[1][:, None]

    q, k, v = rotate(heads[0]), rotate(heads[1]), heads[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / part.head_dim**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def matrix(random_model: Path, random_gguf: Path) -> ImportanceMatrix:
    """Of the random model."""
    return imatrix.measure(random_model, load_tokenizer(random_model, ""), train(), random_gguf)


def test_matrix_is_the_mean_square_of_what_meets_each_column(random_model: Path, matrix: ImportanceMatrix) -> None:
    """Against the blocks computed again in float64: every linear layer of every block, nothing else."""
    wanted, tokens = expected(random_model, AutoTokenizer.from_pretrained(random_model), train())
    assert (matrix.rows, matrix.tokens) == (12, tokens)
    assert matrix.squares.keys() == wanted.keys()
    for name, values in wanted.items():
        assert matrix.squares[name][0] == pytest.approx(values, rel=1e-3, abs=1e-9), name


def test_fused_layers_get_the_names_that_the_file_has(tmp_path: Path) -> None:
    """Phi-3's qkv and gate-up layers are single tensors in the GGUF too; the head is left out."""
    gguf = gguf_py()
    writer = gguf.GGUFWriter(tmp_path / "phi.gguf", "phi3")
    writer.add_block_count(2)
    for name in ("blk.1.attn_qkv", "blk.1.ffn_up", "blk.1.ffn_down", "blk.1.attn_output", "output"):
        writer.add_tensor(f"{name}.weight", np.zeros((4, 8), dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    parts = {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up"}
    modules = [*(f"model.layers.1.{part}" for part in parts), "lm_head"]
    found = imatrix.tensor_names(tmp_path / "phi.gguf", modules)
    assert found == {f"model.layers.1.{part}": f"blk.1.{name}.weight" for part, name in parts.items()}
    one = {name: np.ones((1, 1), dtype=np.float32) for name in found.values()}
    known = ImportanceMatrix(one, one, 1, 1)
    assert imatrix.lacking(tmp_path / "phi.gguf", known) == ["blk.1.ffn_down.weight"]


def test_file_is_what_llama_cpp_reads(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    """Sums and counts by tensor, as tools/imatrix writes them: their quotient is the mean."""
    imatrix.write(tmp_path / "imatrix.gguf", matrix)
    file = gguf_py().GGUFReader(tmp_path / "imatrix.gguf")
    assert file.get_field("general.type").contents() == "imatrix"
    assert file.get_field("imatrix.datasets").contents() == ["train"]
    assert file.get_field("imatrix.chunk_count").contents() == 12
    tensors = {t.name: t.data for t in file.tensors}
    assert len(tensors) == 2 * len(matrix.squares)
    for name, means in matrix.squares.items():  # to the bit: else the file would not give the same GGUF again
        assert np.array_equal(tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"], means), name


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
NAMES = {
    **{"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"},
    **{"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"},
}


def stored_type(model: Architecture, kind: GGUFType, tensor: str, *, imatrix: bool) -> str:
    """What the estimate takes the tensor of that name to be stored as."""
    if tensor == "output.weight":
        return head_type(model, kind)
    if tensor == "token_embd.weight":
        return embedding_type(model, kind)
    _, layer, name, _ = tensor.split(".")
    linear = next(linear for linear in model.linears if NAMES[linear.name] == name)
    return linear_type(model, kind, linear, int(layer), imatrix=imatrix)


def write_gguf(path: Path, model: Architecture, heads: int) -> ImportanceMatrix:
    """A random Llama without a vocabulary, which the quantizer does not ask for, and a matrix for it."""
    writer = gguf_py().GGUFWriter(path, "llama")
    writer.add_block_count(model.layers)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(model.intermediate)
    writer.add_context_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(model.vocabulary)
    random = np.random.default_rng(0)
    shapes = {
        f"blk.{i}.{NAMES[linear.name]}.weight": (linear.outputs, linear.inputs)
        for i in range(model.layers)
        for linear in model.linears
    }
    sums = {name: random.random((1, shape[1]), dtype=np.float32) for name, shape in shapes.items()}
    shapes |= dict.fromkeys(("token_embd.weight", "output.weight"), (model.vocabulary, model.hidden))
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape, dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return ImportanceMatrix(sums, {name: np.ones((1, 1), dtype=np.float32) for name in sums}, 3, 30)


def test_every_type_is_written(tmp_path: Path) -> None:
    """Those that need a matrix, and only those, fail without one; the file says what it was made with."""
    model = read({**CONFIG, "num_hidden_layers": 1, "intermediate_size": 256})
    source, path = tmp_path / "whole.gguf", tmp_path / "made.gguf"
    matrix = write_gguf(source, model, 2)
    for kind in GGUFType:
        given = None
        if kind in IMATRIX_TYPES:
            with pytest.raises(StageError, match="imatrix"):
                quantize(source, path, kind)
            given = matrix
        quantize(source, path, kind, given)
        file = metadata.read(path)
        without_norms = 4 * model.vectors + 48 * model.vocabulary
        size = sum(tensor.size for tensor in file.tensors.values())
        assert gguf_bytes(model, kind, imatrix=given is not None) - without_norms == size, kind
        assert file.fields.get("quantize.imatrix.entries_count", 0) == (len(matrix.squares) if given else 0)
        assert kind in BITS


@pytest.mark.parametrize("heads", [1, 2])
def test_estimated_size_is_what_llama_cpp_reckons(tmp_path: Path, caplog: pytest.LogCaptureFixture, heads: int) -> None:
    """By its own dry run, with few key heads (which get more bits) and with many, with a matrix and without."""
    model = read({**CONFIG, "num_key_value_heads": heads})
    matrix = write_gguf(tmp_path / "whole.gguf", model, heads)
    without_norms = 4 * model.vectors + 48 * model.vocabulary
    caplog.set_level(logging.DEBUG, "finetune.llama")
    for kind in GGUFType:
        for given in (matrix,) if kind in IMATRIX_TYPES else (None, matrix):
            parameters = api.llama_model_quantize_default_params()
            parameters.ftype, parameters.dry_run = file_type(kind), True
            held = hand_over(parameters, given) if given else []
            caplog.clear()
            listen()
            assert api.llama_model_quantize(str(tmp_path / "whole.gguf").encode(), b"", parameters) == 0
            del held
            (found,) = re.findall(r"quant size *= *([0-9.]+) MiB", caplog.text)
            estimated = (gguf_bytes(model, kind, imatrix=given is not None) - without_norms) / 2**20
            assert estimated == pytest.approx(float(found), abs=0.006), (kind, given is None)
            for part in re.split(r"\[ *\d+/ *\d+\] ", " ".join(caplog.messages))[1:]:
                name, chosen = part.split()[0], re.search(r"\((\w+)\)", part)
                kept = chosen[1].upper() if chosen else "F32"
                assert stored_type(model, kind, name, imatrix=given is not None) == kept, (kind, name, given is None)


def test_the_matrix_lowers_the_error_that_it_weighs(
    random_model: Path, random_gguf: Path, matrix: ImportanceMatrix, tmp_path: Path
) -> None:
    """Of a Q4_K tensor of 256-multiple rows: the weighted error of the weights is smaller with the matrix."""
    name = "blk.1.ffn_down.weight"
    right = metadata.read(random_gguf)
    wanted = right.values(name) if right.tensors[name].type == "F32" else None
    if wanted is None:  # gguf-py reads BF16 too
        wanted = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
        wanted = wanted.model.layers[1].mlp.down_proj.weight.detach().numpy()
    errors = []
    for given in (None, matrix):
        quantize(random_gguf, tmp_path / "q.gguf", "Q4_K_S", given)
        file = metadata.read(tmp_path / "q.gguf")
        assert file.tensors[name].type == "Q4_K"
        errors.append(float((((file.values(name) - wanted) ** 2) * matrix.squares[name]).sum()))
    assert errors[1] < 0.97 * errors[0]


def job_for(make_job: JobMaker, model: Path, quantized: dict[str, Any], **roles: Any) -> Job:
    """A job that only quantizes its base."""
    pipeline = [{"name": "gguf", "quantize": quantized}]
    evaluation = {"skip": True, "maxNewTokens": 8}
    return make_job({"test": rows(), **roles}, model=model, pipeline=pipeline, evaluation=evaluation)


def test_stage_measures_by_itself_where_a_type_needs_it(make_job: JobMaker, random_model: Path) -> None:
    """IQ2_XXS is made with a matrix of the train rows; the K type beside it stays as it is without one."""
    job = job_for(make_job, random_model, {"gguf": ["Q4_K_M", "IQ2_XXS"]}, train=train())
    result = job.run("gguf")
    log, files = log_of(job, result), job.files(result)
    assert log["imatrix"]["rows"] == 12
    assert log["imatrix"]["tensors"] == 14
    assert log["imatrix"]["without"] == []
    assert {kind: said["imatrix"] for kind, said in log["types"].items()} == {"Q4_K_M": False, "IQ2_XXS": True}
    assert "withoutImatrix" not in log["types"]["Q4_K_M"]
    assert result.outputs["imatrix"]
    assert metadata.read(files / "tiny-IQ2_XXS.gguf").fields["quantize.imatrix.chunks_count"] == 12
    assert "quantize.imatrix.chunks_count" not in metadata.read(files / "tiny-Q4_K_M.gguf").fields
    assert json.loads(json.dumps(log))


def test_written_matrix_is_for_all_types_and_shown_against_none(make_job: JobMaker, random_model: Path) -> None:
    """``imatrix`` in the spec: of so many rows, for every quant; Q4_K_M is measured without it too, 16 bits are not."""
    job = job_for(make_job, random_model, {"gguf": ["F16", "Q4_K_M"], "imatrix": {"rows": 5}}, train=train())
    log = log_of(job, job.run("gguf"))
    assert log["imatrix"]["rows"] == 5
    assert not log["types"]["F16"]["imatrix"]
    said = log["types"]["Q4_K_M"]
    assert said["imatrix"]
    plain = job_for(make_job, random_model, {"gguf": ["Q4_K_M"]})
    assert said["withoutImatrix"]["kl"] == log_of(plain, plain.run("gguf"))["types"]["Q4_K_M"]["kl"] != said["kl"]


def test_matrix_without_train_rows_is_refused(make_job: JobMaker, random_model: Path) -> None:
    """A job whose train rows all went elsewhere is told so, with the mend."""
    with pytest.raises(ConfigurationError, match=r"quantize.imatrix: there are no train rows"):
        job_for(make_job, random_model, {"gguf": ["IQ1_S"]}).run("gguf")
