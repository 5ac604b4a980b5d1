"""Several adapters as one, reckoned again from their files in numpy's float64."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from tests.unit.test_merging import DOWN, UP, Tensors, base_tensors, lora, write_adapter, write_base

from finetune_jobs.merging import fold
from finetune_jobs.merging.blend import Blend
from finetune_jobs.merging.blend import write_adapter as write_combined
from finetune_jobs.merging.combine import Combination, Drop
from finetune_jobs.merging.merge import merge
from finetune_jobs.run.errors import DataError

Array = npt.NDArray[np.float64]
WEIGHTS = (1.0, -0.5, 0.7)
PLAIN = ("model.embed_tokens.weight", "model.norm.weight")


def wide(rows: int = 64, columns: int = 48) -> Tensors:
    """A base whose layers have enough numbers for shares of them to mean something."""
    return base_tensors() | {f"{UP}.weight": torch.randn(rows, columns), f"{DOWN}.weight": torch.randn(columns, rows)}


def three(directory: Path, **config: Any) -> list[Path]:
    """Adapters of ranks 2, 4 and 2; the last leaves one layer alone."""
    torch.manual_seed(3)
    first = write_adapter(directory / "a", lora(UP, 64, 48) | lora(DOWN, 48, 64), **config)
    second = write_adapter(directory / "b", lora(UP, 64, 48, 4) | lora(DOWN, 48, 64, 4), **(config | {"r": 4}))
    return [first, second, write_adapter(directory / "c", lora(DOWN, 48, 64), **config)]


def blend(adapters: Sequence[Path], how: Any, weights: Sequence[float] = WEIGHTS, **settings: Any) -> Blend:
    """Adapters by the name of their folder."""
    named = [(path.name, path, weight) for path, weight in zip(adapters, weights, strict=False)]
    return Blend(named, Combination(how, **settings))


def merged(
    base: Path, mixed: Blend, output: Path, dtype: torch.dtype = torch.float32
) -> tuple[Tensors, dict[str, Any]]:
    """The merged tensors and the log."""
    output.mkdir()
    log = merge(base, mixed, output, dtype, 4 << 30)
    return load_file(output / "model.safetensors"), log


def delta(adapter: Path, module: str) -> Array | None:
    """What an adapter's two matrices add to a layer, from its files alone."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{module}.lora_"
    if f"{key}A.weight" not in tensors:
        return None
    a, b = (tensors[f"{key}{part}.weight"].double().numpy() for part in "AB")
    found: Array = config["lora_alpha"] / config["r"] * b @ a
    return found


def deltas(adapters: Sequence[Path], module: str) -> list[tuple[int, float, Array]]:
    """Place, weight and delta of each adapter that changes the layer."""
    found = [(n, w, delta(path, module)) for n, (path, w) in enumerate(zip(adapters, WEIGHTS, strict=True))]
    return [(n, w, d) for n, w, d in found if d is not None]


def elect(weighted: Sequence[Array]) -> Array:
    """TIES' second and third step as its paper words them."""
    stacked = np.stack(weighted)
    sign = np.where(stacked.sum(0) >= 0, 1, -1)
    agrees = np.sign(stacked) == sign
    means: Array = (stacked * agrees).sum(0) / np.maximum(agrees.sum(0), 1)
    return means


def difference(got: Tensors, base: Tensors, name: str, wanted: Array) -> float:
    """Relative L2 distance of what was added to the weights."""
    added = got[name].double().numpy() - base[name].double().numpy()
    return float(np.linalg.norm(added - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("config", [{}, {"lora_alpha": 3}], ids=["alpha 4", "alpha 3"])
def test_linear_is_the_weighted_sum_of_deltas(tmp_path: Path, config: dict[str, Any]) -> None:
    """Of adapters of different ranks and scales; other tensors stay, and an adapter may leave a layer alone."""
    tensors = wide()
    base, adapters = write_base(tmp_path / "base", tensors), three(tmp_path, **config)
    got, log = merged(base, blend(adapters, "linear"), tmp_path / "out")
    for module in (UP, DOWN):
        wanted = sum(w * d for _, w, d in deltas(adapters, module))
        assert isinstance(wanted, np.ndarray)
        assert difference(got, tensors, f"{module}.weight", wanted) <= 1e-6
    assert all(torch.equal(got[name], tensors[name]) for name in PLAIN)
    assert log["modules"]["count"] == 2


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_trims_elects_and_averages(tmp_path: Path, density: float) -> None:
    """The largest numbers of each delta by magnitude, the sign with the larger weighted sum, the mean of its side."""
    tensors = wide()
    base, adapters = write_base(tmp_path / "base", tensors), three(tmp_path)
    got, _ = merged(base, blend(adapters, "ties", density=density), tmp_path / "out")
    for module in (UP, DOWN):
        trimmed = []
        for _, weight, found in deltas(adapters, module):
            least = np.sort(np.abs(found), axis=None)[-int(density * found.size)]
            trimmed.append(weight * np.where(np.abs(found) >= least, found, 0))
        wanted = elect(trimmed)
        assert difference(got, tensors, f"{module}.weight", wanted) <= 1e-5
        assert density == 1 or np.mean(wanted == 0) > 0.1


def test_dare_drops_at_random_and_scales_up(tmp_path: Path) -> None:
    """Each number stays or goes by its own 32 bits of Philox, keyed by seed, adapter and tensor; then TIES elects."""
    tensors = wide()
    base, adapters = write_base(tmp_path / "base", tensors), three(tmp_path)
    got, _ = merged(base, blend(adapters, "dareTies", density=0.3, seed=7), tmp_path / "out")
    shares = []
    for module in (UP, DOWN):
        dropped = []
        for place, weight, found in deltas(adapters, module):
            key = int.from_bytes(hashlib.sha256(f"7/{place}/{module}.weight".encode()).digest()[:16], "big")
            words = np.random.Philox(key=key).random_raw(found.size // 2).view(np.uint32).reshape(found.shape)
            kept = words < round(0.3 * 2**32)
            shares.append(kept.mean())
            dropped.append(weight * np.where(kept, found / 0.3, 0))
        assert difference(got, tensors, f"{module}.weight", elect(dropped)) <= 1e-5
    assert max(abs(share - 0.3) for share in shares) < 0.04
    assert len(set(shares)) == len(shares)


@pytest.mark.parametrize(("rank", "kept"), [(None, 4), (3, 3), (40, 40)])
def test_svd_is_the_nearest_of_its_rank(tmp_path: Path, rank: int | None, kept: int) -> None:
    """Of the whole product's singular values the largest stay, by default as many as the largest adapter's rank; the
    log has the share of the norm that is lost, and the adapter that is left adds the same."""
    tensors = wide()
    base, adapters = write_base(tmp_path / "base", tensors), three(tmp_path)
    mixed = blend(adapters, "svd", rank=rank)
    got, log = merged(base, mixed, tmp_path / "out")
    write_combined(mixed, tmp_path / "combined")
    for module in (UP, DOWN):
        whole = sum(w * d for _, w, d in deltas(adapters, module))
        assert isinstance(whole, np.ndarray)
        u, s, vh = np.linalg.svd(whole)
        wanted = u[:, :kept] * s[:kept] @ vh[:kept] if kept < len(s) else whole
        assert difference(got, tensors, f"{module}.weight", wanted) <= 1e-5
        lost = np.linalg.norm(s[kept:]) / np.linalg.norm(s)
        assert log["svd"]["losses"][f"{module}.weight"] == pytest.approx(lost, rel=1e-4, abs=1e-6)
        left = delta(tmp_path / "combined", module)
        assert left is not None
        np.testing.assert_allclose(left, wanted, atol=1e-5)
    assert json.loads((tmp_path / "combined/adapter_config.json").read_text())["r"] == kept


def test_what_svd_leaves_is_merged_as_any_adapter(tmp_path: Path) -> None:
    """The adapter of low rank, folded in alone, gives the very model that the blend gives."""
    tensors = wide()
    base, mixed = write_base(tmp_path / "base", tensors), blend(three(tmp_path), "svd", rank=3)
    got, _ = merged(base, mixed, tmp_path / "out")
    write_combined(mixed, tmp_path / "combined")
    (tmp_path / "again").mkdir()
    merge(base, tmp_path / "combined", tmp_path / "again", torch.float32, 4 << 30)
    again = load_file(tmp_path / "again/model.safetensors")
    for name, tensor in got.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["linear", "ties", "dareTies", "svd"])
def test_same_bytes_whatever_the_blocks_and_threads(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that is repeated is the same file; so is one of smaller blocks on one thread, but for sums' rounding."""
    base, adapters = write_base(tmp_path / "base", wide()), three(tmp_path)
    mixed = blend(adapters, how, density=0.3 if how in ("ties", "dareTies") else 1.0)
    outputs = []
    for number in range(2):
        merged(base, mixed, tmp_path / f"out{number}")
        outputs.append((tmp_path / f"out{number}/model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    monkeypatch.setattr(fold, "_BLOCK_ELEMENTS", 300)
    small, _ = merged(base, mixed, tmp_path / "small")
    for name, tensor in load_file(tmp_path / "out0/model.safetensors").items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_numbers_fate_depends_on_its_place_alone() -> None:
    """The same numbers are dropped however the tensor is divided."""
    drop = Drop(5, 0.4)
    whole = drop.kept(0, 1000)
    for first, count in ((0, 1), (1, 9), (7, 8), (8, 3), (333, 667)):
        np.testing.assert_array_equal(drop.kept(first, count), whole[first : first + count])
    assert Drop(5, 1.0).kept(3, 20).all()


def test_equal_masses_are_positive(tmp_path: Path) -> None:
    """An adapter and its own opposite: the signs hold each other in check, and the positive halves stay."""
    tensors = wide()
    base, (adapter, *_) = write_base(tmp_path / "base", tensors), three(tmp_path)
    got, _ = merged(base, blend([adapter, adapter], "ties", (1.0, -1.0)), tmp_path / "out")
    found = delta(adapter, UP)
    assert found is not None
    assert difference(got, tensors, f"{UP}.weight", np.abs(found)) <= 1e-5


def other(kind: str, directory: Path) -> tuple[Path, dict[str, Any]]:
    """An adapter of another kind, and what it makes of the base's tensors, by hand."""
    match kind:
        case "dora":
            tensors = lora(UP, 64, 48) | {f"base_model.model.{UP}.lora_magnitude_vector": torch.rand(64) * 9}
            path = write_adapter(directory, tensors, use_dora=True)

            def turned(weight: Array) -> Array:
                moved = weight + delta(path, UP)
                length = tensors[f"base_model.model.{UP}.lora_magnitude_vector"].double().numpy()
                found: Array = moved * (length / np.linalg.norm(moved, axis=1))[:, None]
                return found

            return path, {f"{UP}.weight": turned}
        case "ia3":
            factors = torch.rand(64, 1) * 2
            config = {"peft_type": "IA3", "feedforward_modules": []}
            path = write_adapter(directory, {f"base_model.model.{UP}.ia3_l": factors}, **config)
            return path, {f"{UP}.weight": lambda weight: weight * factors.double().numpy()}
        case _:
            table = torch.randn(24, 8)
            saved = {"base_model.model.model.embed_tokens.weight": table}
            path = write_adapter(directory, lora(UP, 64, 48) | saved, modules_to_save=["embed_tokens"])
            return path, {
                f"{UP}.weight": lambda weight: weight + delta(path, UP),
                "model.embed_tokens.weight": lambda _: table.double().numpy(),
            }


@pytest.mark.parametrize("kind", ["dora", "ia3", "whole"])
@pytest.mark.parametrize("how", ["linear", "ties"])
def test_other_kinds_count_by_what_they_add(tmp_path: Path, kind: str, how: str) -> None:
    """DoRA, IA3 and modules that were trained whole: their delta is what merging them alone adds to the weights."""
    tensors = wide()
    base = write_base(tmp_path / "base", tensors)
    (first, *_), (second, makes) = three(tmp_path), other(kind, tmp_path / "other")
    got, _ = merged(base, blend([first, second], how, (0.8, 0.6)), tmp_path / "out")
    for name, makes_of in makes.items():
        weight = tensors[name].double().numpy()
        of_first = delta(first, name.removesuffix(".weight"))
        parts = [0.8 * of_first] if of_first is not None else []
        parts.append(0.6 * (makes_of(weight) - weight))
        wanted = elect(parts) if how == "ties" else np.sum(parts, axis=0)
        assert difference(got, tensors, name, wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["dora", "ia3", "whole"])
def test_svd_is_of_two_matrices_alone(tmp_path: Path, kind: str) -> None:
    """What is no product of A and B has no low rank; it is refused by the tensor's name."""
    base = write_base(tmp_path / "base", wide())
    (first, *_), (second, _) = three(tmp_path), other(kind, tmp_path / "other")
    with pytest.raises(DataError, match=r"tensor model\..*: svd is of lora's A and B alone"):
        merged(base, blend([first, second], "svd"), tmp_path / "out")


def test_adapter_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Which of several it is, before anything is written."""
    base, (first, *_) = write_base(tmp_path / "base", wide()), three(tmp_path)
    wrong = write_adapter(tmp_path / "wrong", lora(UP, 65, 48))
    with pytest.raises(DataError, match=rf"wrong: tensor {UP}.weight has the shape"):
        merged(base, blend([first, wrong], "linear"), tmp_path / "out")
    head = {"base_model.model.lm_head.weight": torch.randn(24, 8)}
    untied = write_adapter(tmp_path / "untied", lora(UP, 64, 48) | head, modules_to_save=["lm_head"])
    with pytest.raises(DataError, match="untied: it trained an output head that is no longer the embedding"):
        merged(base, blend([first, untied], "linear"), tmp_path / "out2")
    assert list((tmp_path / "out").iterdir()) == []
