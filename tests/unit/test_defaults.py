from typing import Any

import pytest

from finetune_api.defaults import adapter_of, resolve_beta, resolve_lora, resolve_quantization, resolve_training
from finetune_api.types import FineTuneJobSpec, Preference, Sft

# reference/practice.md, section 2: (block, method) to learning rate, epochs, optimizer.
TABLE = [
    (Sft, "lora", 2e-4, 3, "adamw"),
    (Sft, "qlora", 2e-4, 3, "pagedAdamw8bit"),
    (Sft, "full", 1e-5, 3, "adamw"),
    (Sft, "prefixTuning", 1e-2, 3, "adamw"),
    (Sft, "promptTuning", 3e-2, 3, "adamw"),
    (Sft, "ia3", 5e-3, 3, "adamw"),
    (Sft, "bottleneck", 1e-4, 3, "adamw"),
    (Preference, "lora", 1e-5, 1, "adamw"),
    (Preference, "bottleneck", 1e-4, 1, "adamw"),
    (Preference, "qlora", 1e-5, 1, "pagedAdamw8bit"),
    (Preference, "full", 5e-7, 1, "adamw"),
]


def a_spec(*pipeline: dict[str, Any]) -> FineTuneJobSpec:
    """A spec with that pipeline."""
    written = {
        "model": {"source": "hf://o/n"},
        "data": {},
        "storage": {"bucket": "finetune"},
        "pipeline": list(pipeline),
    }
    return FineTuneJobSpec.model_validate(written, strict=False)


def block(kind: Any, **fields: Any) -> Any:
    """A block of that kind with these fields."""
    return kind.model_validate(fields, strict=False)


@pytest.mark.parametrize(
    ("kind", "method", "rate", "epochs", "optimizer"), TABLE, ids=[f"{r[0].__name__}-{r[1]}" for r in TABLE]
)
def test_defaults_by_block_and_method(kind: Any, method: str, rate: float, epochs: float, optimizer: str) -> None:
    """The table of practice.md."""
    training = resolve_training(block(kind, method=method))
    assert (training.learning_rate, training.epochs, training.optimizer) == (rate, epochs, optimizer)


PREFERENCE = {  # adapters, full, beta
    "dpo": (1e-5, 5e-7, 0.1),
    "ipo": (1e-5, 5e-7, 0.1),
    "kto": (1e-5, 1e-6, 0.1),
    "orpo": (5e-5, 5e-6, 0.1),
    "simpo": (1e-5, 1e-6, 2.0),
}


@pytest.mark.parametrize("loss", PREFERENCE)
def test_defaults_by_preference_loss(loss: str) -> None:
    """The same table; a beta that is written stays."""
    adapter, full, beta = PREFERENCE[loss]
    rates = [resolve_training(block(Preference, loss=loss, method=m)).learning_rate for m in ("lora", "qlora", "full")]
    assert rates == [adapter, adapter, full]
    assert resolve_beta(block(Preference, loss=loss)) == beta
    assert resolve_beta(block(Preference, loss=loss, beta=0.7)) == 0.7


def test_what_is_written_stays() -> None:
    """Defaults only fill what was left out."""
    written = {"learningRate": 0.5, "epochs": 7, "optimizer": "adamw8bit", "batchSize": 3}
    training = resolve_training(block(Sft, method="qlora", training=written))
    assert (training.learning_rate, training.epochs, training.optimizer, training.batch_size) == (
        0.5,
        7,
        "adamw8bit",
        3,
    )


def test_alpha_is_twice_the_rank() -> None:
    """Unless written; full training has no adapter."""
    assert resolve_lora(block(Sft)).alpha == 32  # type: ignore[union-attr]
    assert resolve_lora(block(Sft, lora={"r": 8})).alpha == 16  # type: ignore[union-attr]
    assert resolve_lora(block(Sft, lora={"r": 8, "alpha": 5.0})).alpha == 5  # type: ignore[union-attr]
    assert resolve_lora(block(Sft, method="full")) is None


def test_only_qlora_quantizes_its_base() -> None:
    """With double quantization unless written otherwise."""
    assert resolve_quantization(block(Sft)) is None
    assert resolve_quantization(block(Sft, method="qlora")).double_quant is True  # type: ignore[union-attr]
    assert resolve_quantization(block(Sft, method="qlora", quantization={"doubleQuant": False})).double_quant is False  # type: ignore[union-attr]


def test_an_adapter_that_is_trained_on_keeps_the_settings_of_the_stage_that_began_it() -> None:
    """What `plan` says of a preference stage after SFT is what it will train: SFT's adapter, not a default one."""
    spec = a_spec({"name": "sft", "sft": {"lora": {"r": 32}}}, {"name": "dpo", "preference": {}})
    for name in ("sft", "dpo"):
        lora = adapter_of(spec, name)
        assert lora is not None
        assert (lora.r, lora.alpha) == (32, 64)


def test_a_stage_after_a_merge_begins_an_adapter_of_its_own() -> None:
    """The merged model has none."""
    spec = a_spec(
        {"name": "sft", "sft": {"lora": {"r": 32}}}, {"name": "merge", "merge": {}}, {"name": "dpo", "preference": {}}
    )
    lora = adapter_of(spec, "dpo")
    assert lora is not None
    assert lora.r == 16
