import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_jobs.merging import files
from finetune_jobs.merging import merge as merging
from finetune_jobs.merging.adapter import read_adapter
from finetune_jobs.merging.updates import LoraUpdate
from finetune_jobs.merging.weights import INDEX, ShardWriter, TensorSpec, Weights
from finetune_jobs.run.errors import ConfigurationError, DataError, InputMissingError, PreemptedError, StageError

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def lora(module: str, rows: int, columns: int, rank: int = 2) -> Tensors:
    """An adapter's two matrices for one module, as PEFT names them."""
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.lora_A.weight": torch.randn(rank, columns),
        f"{prefix}.lora_B.weight": torch.randn(rows, rank) / 4,
    }


def write_adapter(directory: Path, tensors: Tensors, **config: Any) -> Path:
    """An adapter directory; the config may be overridden key by key."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    words = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "megatron_core": "megatron.core"}
    (directory / "adapter_config.json").write_text(json.dumps(words | config))
    return directory


def base_tensors() -> Tensors:
    """A few tensors of a model, no two of one shape."""
    return {
        "model.embed_tokens.weight": torch.randn(24, 8),
        f"{UP}.weight": torch.randn(16, 8),
        f"{DOWN}.weight": torch.randn(8, 16),
        "model.norm.weight": torch.randn(8),
    }


def write_base(directory: Path, tensors: Tensors, **config: Any) -> Path:
    """A model directory with one safetensors file."""
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"dtype": "float32", "hidden_size": 8} | config))
    return directory


def merge(
    base: Path,
    adapter: Path,
    output: Path,
    dtype: torch.dtype = torch.float32,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Merge into a directory made for it."""
    output.mkdir(exist_ok=True)
    return merging.merge(base, adapter, output, dtype, 4 << 30, on_tensor)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        pytest.param({}, 2.0, id="alpha over r"),
        pytest.param({"use_rslora": True}, 4 / math.sqrt(2), id="rank stabilized"),
        pytest.param({"alpha_pattern": {"up_proj": 10}}, 5.0, id="alpha pattern, end of the name"),
        pytest.param({"alpha_pattern": {r"model.layers.\d.mlp.up_proj": 10}}, 5.0, id="alpha pattern, expression"),
        pytest.param({"alpha_pattern": {"p_proj": 10}}, 2.0, id="alpha pattern, part of a word does not match"),
        pytest.param({"r": 8, "rank_pattern": {"up_proj": 2}}, 2.0, id="rank pattern"),
        pytest.param({"r": 8, "rank_pattern": {"up_proj": 2}, "use_rslora": True}, 4 / math.sqrt(2), id="both"),
    ],
)
def test_scale(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    """The scale follows alpha, r, their patterns and rank stabilization, as in PEFT."""
    update = read_adapter(write_adapter(tmp_path / "a", lora(UP, 16, 8), **config))[f"{UP}.weight"]
    assert isinstance(update, LoraUpdate)
    assert update.scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param({"peft_type": "LOHA"}, "peft_type is LOHA", id="another kind of adapter"),
        pytest.param({"peft_type": None}, "peft_type is", id="no type"),
        pytest.param({"use_dora": True}, "use_dora", id="dora without magnitudes"),
        pytest.param({"lora_bias": True}, "lora_bias", id="lora bias"),
        pytest.param({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'", id="pissa"),
        pytest.param({"target_parameters": ["experts.up"]}, "target_parameters", id="fused experts"),
        pytest.param({"some_new_variant": {"x": 1}}, "some_new_variant", id="a setting of a later PEFT"),
        pytest.param({"r": 4}, "not the rank 4", id="another rank than the matrices"),
        pytest.param({"lora_alpha": None}, "lora_alpha", id="no alpha"),
    ],
)
def test_unsupported_adapter(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    """A setting that we would merge wrongly is refused by its name."""
    adapter = write_adapter(tmp_path / "a", lora(UP, 16, 8), **config)
    with pytest.raises(DataError, match=words):
        read_adapter(adapter)


def broken(change: str) -> Tensors:
    """A sound adapter with one thing wrong."""
    tensors = lora(UP, 16, 8)
    match change:
        case "unknown key":
            return tensors | {f"base_model.model.{UP}.lora_embedding_A": torch.ones(16)}
        case "magnitude":
            return tensors | {f"base_model.model.{UP}.lora_magnitude_vector": torch.ones(16)}
        case "half a pair":
            return {key: tensor for key, tensor in tensors.items() if "lora_A" in key}
        case "not finite":
            tensors[f"base_model.model.{UP}.lora_B.weight"][3, 1] = math.nan
        case "other rows":
            return lora(UP, 17, 8)
        case "other columns":
            return lora(UP, 16, 9)
        case "other model":
            return tensors | lora("model.layers.7.mlp.up_proj", 16, 8)
        case "head":
            return tensors | lora("lm_head", 24, 8)
        case "empty":
            return {}
    return tensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("unknown key", "lora_embedding_A"),
        ("magnitude", f"{UP} and use_dora"),
        ("half a pair", f"{UP} has no lora_B"),
        ("not finite", rf"{UP}.lora_B.weight' is not finite"),
        ("other rows", rf"tensor {UP}.weight has the shape \(16, 8\), the adapter was trained on \(17, 8\)"),
        ("other columns", rf"tensor {UP}.weight has the shape \(16, 8\), the adapter was trained on \(16, 9\)"),
        ("other model", "no tensor model.layers.7.mlp.up_proj.weight"),
        ("head", "lm_head"),
        ("empty", "nothing to merge"),
    ],
)
def test_adapter_that_does_not_fit(change: str, words: str, tmp_path: Path) -> None:
    """An adapter whose tensors do not all find their place is refused, naming the tensor; nothing is written."""
    base = write_base(tmp_path / "base", base_tensors())
    adapter = write_adapter(tmp_path / "adapter", broken(change))
    with pytest.raises(DataError, match=words):
        merge(base, adapter, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_base_without_prefix(tmp_path: Path) -> None:
    """A checkpoint that was saved without the head's prefix takes the adapter too."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in base_tensors().items()}
    adapter = lora(UP, 16, 8)
    merge(write_base(tmp_path / "b", tensors), write_adapter(tmp_path / "a", adapter), tmp_path / "out")
    b, a = (adapter[f"base_model.model.{UP}.lora_{part}.weight"] for part in "BA")
    wanted = tensors["layers.0.mlp.up_proj.weight"] + 2 * b @ a
    torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors")["layers.0.mlp.up_proj.weight"], wanted)


def test_unchanged_adapter_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An adapter whose B is zero gives the base again, and a warning."""
    tensors = base_tensors()
    adapter = {k: t if "lora_A" in k else torch.zeros_like(t) for k, t in lora(UP, 16, 8).items()}
    log = merge(write_base(tmp_path / "b", tensors), write_adapter(tmp_path / "a", adapter), tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert log["unchanged"]
    assert "the adapter changes nothing" in caplog.text
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    """A weight beyond float16 is named and stops the merge, whether or not the adapter touches it."""
    tensors = base_tensors()
    tensors["model.norm.weight"][2] = 1e6
    base, adapter = write_base(tmp_path / "b", tensors), write_adapter(tmp_path / "a", lora(UP, 16, 8))
    with pytest.raises(ConfigurationError, match=r"merge.dtype float16 cannot hold tensor model.norm.weight"):
        merge(base, adapter, tmp_path / "out", torch.float16)
    log = merge(base, adapter, tmp_path / "out2", torch.bfloat16)
    assert 0 < log["modules"]["largestError"] < 2**-8


def test_prequantized_base_is_refused(tmp_path: Path) -> None:
    """A base whose weights are stored quantized is refused before anything is read."""
    base = write_base(tmp_path / "b", base_tensors(), quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigurationError, match=r"spec\.model\.source"):
        merge(base, write_adapter(tmp_path / "a", lora(UP, 16, 8)), tmp_path / "out")


def test_full_disk_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little room for the result is an error with both sizes, and no file is begun."""
    base, adapter = write_base(tmp_path / "b", base_tensors()), write_adapter(tmp_path / "a", lora(UP, 16, 8))
    usage = type("usage", (), {"free": 1 << 20})
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StageError, match=r"takes 0\.00 GiB and .* has 0\.00 GiB free"):
        merge(base, adapter, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_stop_between_tensors(tmp_path: Path) -> None:
    """Being told to stop ends the merge after the tensor at hand."""
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 2:
            raise PreemptedError("told to stop")

    base, adapter = write_base(tmp_path / "b", base_tensors()), write_adapter(tmp_path / "a", lora(UP, 16, 8))
    with pytest.raises(PreemptedError):
        merge(base, adapter, tmp_path / "out", on_tensor=stop)
    assert seen == [1, 2]


def test_wrong_weight_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged matrix that is not W + scale B A on the disk fails the module check, naming it."""
    fold = merging.fold

    def fold_then_damage(*arguments: Any) -> None:
        fold(*arguments)
        path = tmp_path / "out/model.safetensors"
        tensors = load_file(path)
        tensors[f"{DOWN}.weight"][0] *= 1.01
        save_file(tensors, path)

    monkeypatch.setattr(merging, "fold", fold_then_damage)
    base = write_base(tmp_path / "b", base_tensors())
    adapter = write_adapter(tmp_path / "a", lora(UP, 16, 8) | lora(DOWN, 8, 16))
    with pytest.raises(StageError, match=rf"merged tensor {DOWN}.weight is wrong"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("tied", "equal", "kept"),
    [
        pytest.param(True, True, False, id="tied: the copy goes"),
        pytest.param(True, False, True, id="tied in name only: both stay"),
        pytest.param(False, True, True, id="untied: both stay"),
    ],
)
def test_output_head(tied: bool, equal: bool, kept: bool, tmp_path: Path) -> None:
    """``lm_head.weight`` is left out exactly when it is the embedding under another name."""
    tensors = base_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + (0 if equal else 1)
    base = write_base(tmp_path / "b", tensors, tie_word_embeddings=tied)
    merge(base, write_adapter(tmp_path / "a", lora(UP, 16, 8)), tmp_path / "out")
    assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) is kept
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is tied


def specs_of(tensors: Tensors) -> dict[str, TensorSpec]:
    """What the writer needs to know."""
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_shards_written_in_any_order(tmp_path: Path) -> None:
    """Files filled in backwards, row by row, are what safetensors' own reader takes, whatever the types and shapes."""
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "half": torch.randn(4, 3).half(),
        "brain": torch.randn(5, 2, 3).bfloat16(),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 4),
    }
    with ShardWriter(tmp_path, specs_of(tensors), 1 << 30) as writer:
        for name, tensor in reversed(tensors.items()):
            rows = tensor if tensor.dim() else tensor.reshape(1)
            for row in reversed(range(len(rows))):
                writer.write(name, row, rows[row : row + 1])
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    content = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert header["__metadata__"] == {"format": "pt"}


def test_sharding(tmp_path: Path) -> None:
    """Shards stay within the size unless one tensor alone is larger, and the index names each tensor's file."""
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(5)} | {"large": torch.randn(40, 40)}
    with ShardWriter(tmp_path, specs_of(tensors), 1000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 400 + 6400
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert len(held) == 1 or sum(t.numel() * 4 for t in held.values()) <= 1000
        assert all(index["weight_map"][name] == shard and torch.equal(t, tensors[name]) for name, t in held.items())
    read = Weights(tmp_path)
    assert read.size_bytes == 8400
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("what", ["no file", "cut short", "shard missing"])
def test_missing_weights(what: str, tmp_path: Path) -> None:
    """A model whose weights are missing or cut short is an input that is missing, with the file named."""
    base = write_base(tmp_path / "b", base_tensors())
    path = base / "model.safetensors"
    match what:
        case "no file":
            path.unlink()
        case "cut short":
            path.write_bytes(path.read_bytes()[:-4])
        case _:
            (base / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(InputMissingError, match="safetensors"):
        Weights(base)


def test_other_files_travel(tmp_path: Path) -> None:
    """Tokenizer, template, configs and model code are copied byte for byte; weights and bookkeeping are not."""
    kept = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "modeling.py",
        "sub/vocab.txt",
        "tokenizer.json",
    ]
    left = ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", ".cache/x.json", "onnx/m.onnx"]
    for name in [*kept, *left]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(f"{{}} {name}")
    assert files.copy_all_but_weights(tmp_path / "in", tmp_path / "out") == kept
    assert all((tmp_path / "out" / name).read_text() == f"{{}} {name}" for name in kept)
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == sorted(Path(n).name for n in kept)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({"dtype": "float32"}, {"dtype": "bfloat16"}, id="new spelling"),
        pytest.param({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}, id="old spelling"),
        pytest.param({}, {"dtype": "bfloat16"}, id="not written"),
        pytest.param(
            {"dtype": "float32", "text_config": {"dtype": "float32", "x": 1}},
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "x": 1}},
            id="nested",
        ),
    ],
)
def test_config_dtype(before: dict[str, Any], after: dict[str, Any], tmp_path: Path) -> None:
    """The config names the type of the merged weights; every other word of it stays."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 3, **before}))
    files.set_dtype(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {"vocab_size": 3, **after}


def test_chat_template_override(tmp_path: Path) -> None:
    """A template written in the job replaces both places where a model keeps its own."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old", "eos_token": "</s>"}))
    files.set_chat_template(tmp_path, "new")
    assert (tmp_path / "chat_template.jinja").read_text() == "new"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
