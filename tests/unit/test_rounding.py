import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import llama_cpp
import numpy as np
import pytest
import torch
from torch import Tensor

from finetune_api.types import GGUFType, QATType
from finetune_jobs.estimate import embedding_type, head_type, linear_type, read
from finetune_jobs.gguf.release import gguf_py
from finetune_jobs.training.rounding import TYPES, rounded

Array = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors only lose by sharing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def by_llama_cpp() -> Callable[[Array, str], Array]:
    """Quantizes rows and reads them back by the very functions that llama.cpp's quantizer calls."""
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib/libggml-base.so"))
    library.ggml_row_size.restype = library.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64

    def round_trip(x: Array, kind: str) -> Array:
        which = int(gguf_py().GGMLQuantizationType[kind])
        rows, columns = x.shape
        stored = np.zeros((rows, library.ggml_row_size(ctypes.c_int(which), number(columns))), np.uint8)
        found = np.empty_like(x)
        source, middle, out = (pointer(array.ctypes.data) for array in (x, stored, found))
        sizes = (number(0), number(rows), number(columns))
        library.ggml_quantize_chunk(ctypes.c_int(which), source, middle, *sizes, pointer(None))
        name = kind.lower() if "_K" not in kind else kind[0].lower() + kind[1:]
        getattr(library, f"dequantize_row_{name}")(middle, out, number(x.size))
        return found

    return round_trip


def weights() -> dict[str, Tensor]:
    """Rows as models have them, and as they hardly have them."""
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, 512, generator=generator)

    holes = normal(64)
    holes[:, ::2] = 0
    holes[:8], holes[8], holes[9] = 0, 1.5, -2.0
    return {
        "normal": normal(1500) * 0.05,
        "bf16": (normal(300) * 0.02).bfloat16().float(),
        "outliers": normal(300) ** 5,
        "positive": torch.rand(100, 512, generator=generator),
        "negative": -torch.rand(100, 512, generator=generator),
        "tiny": normal(64) * 1e-7,
        "holes": holes,
    }


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in ("BF16", "F16")])
def test_rounded_to_the_bit_as_llama_cpp_rounds(kind: str, by_llama_cpp: Callable[[Array, str], Array]) -> None:
    """Quantized and dequantized by its own C code: every number is equal."""
    for name, weight in weights().items():
        wanted = by_llama_cpp(weight.numpy(), kind)
        assert np.array_equal(rounded(weight, kind).numpy(), wanted), name
        assert not np.array_equal(wanted, weight.numpy())


def test_rounded_is_what_the_release_in_python_gives() -> None:
    """Where gguf-py quantizes by itself, it agrees too."""
    gguf, weight = gguf_py(), weights()["bf16"]
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        which = gguf.GGMLQuantizationType[kind]
        wanted = gguf.dequantize(gguf.quantize(weight.numpy(), which), which)
        assert np.array_equal(rounded(weight, kind).numpy(), wanted), kind


def test_a_half_is_a_half() -> None:
    """Rows that fit no block are kept in 16 bits."""
    weight = torch.linspace(-1, 1, 93).view(3, 31)
    assert torch.equal(rounded(weight, "F16"), weight.half().float())


@pytest.mark.parametrize("width", [256, 96, 31])
def test_all_that_can_be_trained_for_can_be_rounded(width: int) -> None:
    """Whatever the file's type and the model's width, each tensor has a type that is known here."""
    config = {"num_hidden_layers": 80, "num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 64}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": 8}
    for tied in (True, False):
        model = read({"model_type": "llama", **config, **sizes, "tie_word_embeddings": tied})
        for kind in map(GGUFType, get_args(QATType)):
            layers = (linear_type(model, kind, linear, layer) for linear in model.linears for layer in range(80))
            assert {head_type(model, kind), embedding_type(model, kind), *layers} <= set(TYPES), kind
