import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from finetune_jobs.gguf import metadata, release
from finetune_jobs.gguf.convert import supported
from finetune_jobs.gguf.readback import llama3_factors
from finetune_jobs.run.errors import ConfigurationError, InputMissingError


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with every kind of value and three types of tensors, written by gguf-py."""
    gguf = release.gguf_py()
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("t.u8", 200)
    writer.add_int64("t.i64", -(2**40))
    writer.add_float64("t.f64", 0.1)
    writer.add_bool("t.flag", True)
    writer.add_string("t.text", "Grüße 🦙")
    writer.add_array("t.words", ["a", "", "ß"])
    writer.add_array("t.numbers", [1, -2, 3])
    writer.add_custom_alignment(64)
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("f32", values)
    writer.add_tensor("f16", values.astype(np.float16))
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("q8", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_head_of_a_file_is_read_as_it_was_written(small: Path) -> None:
    """Values of every kind, and name, shape, type and weights of every tensor, also behind an odd alignment."""
    file = metadata.read(small)
    fields = {name[2:]: value for name, value in file.fields.items() if name.startswith("t.")}
    assert fields == {
        "u8": 200,
        "i64": -(2**40),
        "f64": 0.1,
        "flag": True,
        "text": "Grüße 🦙",
        "words": ["a", "", "ß"],
        "numbers": [1, -2, 3],
    }
    assert {(t.name, t.shape, t.type, t.size) for t in file.tensors.values()} == {
        ("f32", (2, 32), "F32", 256),
        ("f16", (2, 32), "F16", 128),
        ("q8", (2, 32), "Q8_0", 68),
    }
    expected = np.arange(64, dtype=np.float32).reshape(2, 32)
    assert np.array_equal(file.values("f32"), expected)
    assert np.array_equal(file.values("f16"), expected)
    assert np.allclose(file.values("q8"), expected, atol=63 / 127 / 2 + 0.01)


def test_bits_per_weight_count_the_tensors_bytes(small: Path) -> None:
    """(256 + 128 + 68) bytes for 192 weights."""
    assert metadata.read(small).summary() == {
        "parameters": 192,
        "bitsPerWeight": round(8 * 452 / 192, 3),
        "tensors": {"F32": 1, "F16": 1, "Q8_0": 1},
    }


@pytest.mark.parametrize("keep", [0, 3, 24, 100, -100])
def test_cut_files_are_not_read(small: Path, keep: int) -> None:
    """Wherever a file is cut, that is an input that is missing, not a traceback."""
    small.write_bytes(small.read_bytes()[:keep])
    with pytest.raises(InputMissingError, match=r"small\.gguf is not a whole GGUF"):
        metadata.read(small)


@pytest.mark.parametrize(("factor", "theta"), [(8.0, 500000.0), (32.0, 500000.0), (32.0, 10000.0)])
def test_llama3_factors_are_those_of_transformers(factor: float, theta: float) -> None:
    """The scaling that is recognised in a GGUF is the one that transformers computes from its parameters."""
    scaling = {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = {"rope_type": "llama3", "rope_theta": theta, **scaling}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=rope)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (np.arange(0, 128, 2) / 128)
    found = llama3_factors(128, theta, factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original=8192)
    assert np.allclose(plain / frequencies.numpy(), found, rtol=1e-4)


@pytest.mark.parametrize(
    ("architectures", "known"),
    [
        (["LlamaForCausalLM"], True),
        (["Qwen3ForCausalLM"], True),
        (["NoSuchForCausalLM"], False),
        ([], False),
        (None, False),
    ],
)
def test_supported_reads_the_converters_own_table(architectures: list[str] | None, known: bool) -> None:
    """What the converter registers is supported, nothing else."""
    assert supported(json.loads(json.dumps({"architectures": architectures}))) is known


def test_missing_release_names_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the converter the words say what to run."""
    monkeypatch.setenv("FINETUNE_LLAMA_CPP", str(tmp_path))
    with pytest.raises(ConfigurationError, match="make setup"):
        release.directory()
