import pytest

from finetune_api.pipeline import Target
from finetune_api.types import GGUFType
from finetune_jobs.evaluation import precision

TUNED = [Target("merge"), Target("gguf", "Q4_K_M"), Target("gguf", bitsandbytes="int8"), Target("gguf", "IQ2_XS")]
MADE = {
    "gguf/Q4_K_M": {
        "type": "Q4_K_M",
        "parameters": 1000,
        "bitsPerWeight": 4.9,
        "sizeBytes": 620,
        "kl": 0.1,
        "top1": 0.9,
    },
    "gguf/int8": {"type": "int8", "bitsPerWeight": 8.1, "sizeBytes": 1010, "kl": 0.01, "top1": 0.98},
    "gguf/IQ2_XS": {
        "type": "IQ2_XS",
        "parameters": 1000,
        "bitsPerWeight": 2.6,
        "sizeBytes": 330,
        "kl": 0.9,
        "top1": 0.4,
    },
}
SCORES = {name: {"exactMatch": score} for name, score in zip(["merge", *MADE], [0.8, 0.76, 0.8, 0.2], strict=True)}


def test_rows_go_down_in_bits_with_what_was_measured() -> None:
    """Reference, 16-bit model, then each form: its bits, size, divergence, score and share of the 16-bit model's."""
    rows = precision.table(TUNED, MADE, SCORES, "exactMatch")
    assert [(row["precision"], row["form"]) for row in rows] == [
        ("fp32", "the reference"),
        ("16 bits", "merge"),
        ("int8", "int8"),
        ("int4", "Q4_K_M"),
        ("int2", "IQ2_XS"),
    ]
    assert [row["sizeBytes"] for row in rows] == [4000, 2000, 1010, 620, 330]
    assert [row.get("share") for row in rows[2:]] == pytest.approx([1.0, 0.95, 0.25])
    assert [row.get("kl") for row in rows] == [0.0, None, 0.01, 0.1, 0.9]
    wide = precision.table(TUNED, MADE, SCORES, "exactMatch", wide=["merge"])[1]
    assert (wide["precision"], wide["bitsPerWeight"], wide["sizeBytes"]) == ("fp32", 32.0, 4000)


def test_without_scores_or_quants_nothing_is_made_up() -> None:
    """No metric, no share; a model that scored 0 has none either; nothing quantized, no table."""
    assert "score" not in precision.table(TUNED, MADE, SCORES, None)[0]
    assert all(row.get("share") is None for row in precision.table(TUNED, MADE, SCORES, None))
    nothing = SCORES | {"merge": {"exactMatch": 0.0}}
    assert all(row.get("share") is None for row in precision.table(TUNED, MADE, nothing, "exactMatch"))
    assert precision.table(TUNED[:1], {}, SCORES, "exactMatch") == []


def test_every_type_has_a_precision() -> None:
    """By the bits in its name; the lesson's int8, int4 and int2 are among them."""
    found = {precision.of(kind) for kind in [*GGUFType, "nf4", "int8"]}
    assert found == {"fp32", "fp16", "bf16", *(f"int{n}" for n in (1, 2, 3, 4, 5, 6, 8))}
