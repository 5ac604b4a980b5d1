"""What fewer bits cost this very model: every form that was made, by precision, from 32 bits down. Pure."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from finetune_api.pipeline import Target
from finetune_jobs.evaluation.answers import Scores

Json = dict[str, Any]
_WHOLE = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def of(kind: str) -> str:
    """The precision of a type by its nominal bits: ``Q4_K_M`` and ``nf4`` are ``int4``."""
    digits = re.search(r"\d", kind)
    return _WHOLE.get(kind) or f"int{digits[0] if digits else '?'}"


def table(
    tuned: Sequence[Target],
    quantized: Mapping[str, Json],
    scores: Mapping[str, Scores],
    metric: str | None,
    wide: Collection[str] = (),
) -> list[Json]:
    """One row for each form: bits a weight and bytes of the file, divergence from the 16-bit model in float32,
    ``metric`` and what share of the 16-bit model's it is. Empty where nothing was quantized. ``wide``: models that were
    merged in float32.

    The first row is the reference that the others were held against; its size is reckoned, no such file is made.
    """
    parameters = next((q["parameters"] for q in quantized.values() if "parameters" in q), None)
    if parameters is None:
        return []
    whole = next((t.name for t in reversed(tuned) if t.quantized is None), None)
    best = scores[whole].get(metric) if whole and metric else None
    rows: list[Json] = [
        {"precision": "fp32", "form": "the reference", "bitsPerWeight": 32.0, "sizeBytes": 4 * parameters, "kl": 0.0}
    ]
    if whole is not None:
        name, bits = ("fp32", 32) if whole in wide else ("16 bits", 16)
        size = {"bitsPerWeight": float(bits), "sizeBytes": bits // 8 * parameters}
        rows.append({"precision": name, "form": whole, **size, "score": best})
    for name, made in quantized.items():
        score = scores[name].get(metric) if metric else None
        rows.append(
            {
                "precision": of(made["type"]),
                "form": made["type"],
                **{key: made.get(key) for key in ("bitsPerWeight", "sizeBytes", "kl", "top1")},
                "score": score,
                "share": score / best if score is not None and best else None,
            }
        )
    return sorted(rows, key=lambda row: -(row["bitsPerWeight"] or 0))
