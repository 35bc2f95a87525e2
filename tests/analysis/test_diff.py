"""Differences of two checkpoints: planted changes are told by their verdicts and numbers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from lightning_lowrank.analysis.diff import Difference, differences
from lightning_lowrank.analysis.matrices import places
from lightning_lowrank.models.checkpoints import Checkpoint


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(30, 40, generator=generator).double() for name in ("a", "b", "c", "d")}


def found(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], folder: Path, **options: float
) -> dict[str, Difference]:
    for name, state in (("a.pt", one), ("b.pt", other)):
        torch.save(dict(state), folder / name)
    a, b = Checkpoint(folder / "a.pt"), Checkpoint(folder / "b.pt")
    return {d.name: d for d in differences(a, b, places(a), places(b), **options)}  # type: ignore[arg-type]


def low_rank(rank: int, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    left, right = (torch.randn(n, rank, generator=generator).double() for n in (30, 40))
    return size * torch.linalg.qr(left)[0] @ torch.linalg.qr(right)[0].T


def test_each_matrix_has_the_verdict_of_what_was_done_to_it(tmp_path: Path) -> None:
    before = weights()
    after = {
        "a.weight": before["a.weight"],
        "b.weight": before["b.weight"] + low_rank(2, 0.1),
        "c.weight": weights(1)["c.weight"],
        "new.weight": before["d.weight"] * 1.01,
        "extra.weight": torch.ones(3, 3).double(),
    }

    verdicts = {name: one.verdict for name, one in found(before, after, tmp_path).items()}

    assert verdicts == {
        "a.weight": "not moved",
        "b.weight": "moved",
        "c.weight": "re-initialised",
        "d.weight": "renamed new.weight",
        "extra.weight": "only in B",
    }


def test_the_rank_of_a_planted_change_is_found(tmp_path: Path) -> None:
    before = weights()
    after = before | {"b.weight": before["b.weight"] + low_rank(3, 0.5)}

    values = found(before, after, tmp_path, energy=0.9)["b.weight"].values

    assert values["change_norm"] == pytest.approx(0.5 * 3**0.5)
    assert values["change_stable_rank"] == pytest.approx(3)
    assert values["change_effective_rank"] == pytest.approx(3, rel=1e-3)
    assert values["lora_rank"] == 3
    assert values["change_relative_stable_rank"] < 0.4


def test_a_direction_outside_of_the_column_space_is_an_intruder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a = torch.zeros(30, 20).double()
    a[:20] = torch.randn(20, 20)
    outside = torch.zeros(30, 1).double()
    outside[25] = 1
    after = {
        "intruded": a + 40 * outside @ torch.nn.functional.normalize(torch.randn(1, 20).double()),
        "scaled": 1.3 * a,
    }

    values = found({"intruded": a, "scaled": a.clone()}, after, tmp_path)

    assert values["intruded"].values["intruders"] == 1
    assert values["scaled"].values["intruders"] == 0
    assert values["scaled"].values["top_left_overlap"] == pytest.approx(1)


def test_shares_and_overlaps_are_those_of_numpy(tmp_path: Path) -> None:
    before = weights()
    change = low_rank(4, 0.7) + 0.01 * weights(5)["a.weight"]
    after = before | {"a.weight": before["a.weight"] + change}

    values = found(before, after, tmp_path, top=5)["a.weight"].values

    a, b = (state["a.weight"].numpy() for state in (before, after))
    (u, _, vt), (x, _, yt) = np.linalg.svd(a), np.linalg.svd(b)
    d = b - a
    assert_allclose(values["change_in_top_left"], (np.linalg.norm(u[:, :5].T @ d) / np.linalg.norm(d)) ** 2)
    assert_allclose(values["change_in_top_right"], (np.linalg.norm(d @ vt[:5].T) / np.linalg.norm(d)) ** 2)
    assert_allclose(values["top_left_overlap"], (np.linalg.svd(u[:, :5].T @ x[:, :5])[1] ** 2).mean())
    assert_allclose(values["top_right_overlap"], (np.linalg.svd(vt[:5] @ yt[:5].T)[1] ** 2).mean())
    assert_allclose([values["change_in_top_left_chance"], values["change_in_top_right_chance"]], [5 / 30, 5 / 40])
    assert_allclose(values["cosine"], (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_random_change_lies_in_the_top_directions_by_chance(tmp_path: Path) -> None:
    shares = []
    for seed in range(20):
        before, noise = weights(2 * seed), weights(2 * seed + 1)
        after = {name: before[name] + 0.01 * noise[name] for name in before}
        several = found(before, after, tmp_path).values()
        shares += [one.values["change_in_top_left"] / one.values["change_in_top_left_chance"] for one in several]

    assert np.mean(shares) == pytest.approx(1, abs=4 * np.std(shares) / len(shares) ** 0.5)


def test_what_has_nothing_in_common_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.pt and .*b\.pt have no matrix of the same name .* a\.weight \(30, 40\)"):
        found(weights(), {"x": torch.ones(5, 7)}, tmp_path)
    with pytest.raises(ValueError, match="top=0 must be at least 1"):
        found(weights(), weights(), tmp_path, top=0)
    with pytest.raises(ValueError, match=r"energy=1\.5 above 0"):
        found(weights(), weights(), tmp_path, energy=1.5)


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    broken = weights() | {"a.weight": torch.full((30, 40), torch.nan).double()}

    verdicts = {name: one.verdict for name, one in found(weights(), broken, tmp_path).items()}

    assert verdicts == {"a.weight": "not finite", **dict.fromkeys(["b.weight", "c.weight", "d.weight"], "not moved")}


def test_a_matrix_of_zeros_has_no_directions(tmp_path: Path) -> None:
    nothing = weights() | {"a.weight": torch.zeros(30, 40).double()}

    for one in (found(weights(), nothing, tmp_path), found(nothing, weights(), tmp_path)):
        assert "intruders" not in one["a.weight"].values and "change_in_top_left" not in one["a.weight"].values


def test_a_copy_in_another_dtype_is_rounded_and_not_moved(tmp_path: Path) -> None:
    before = {name: weight.float() for name, weight in weights().items()}
    after = {name: weight.bfloat16() for name, weight in before.items()}
    after["b.weight"] = (before["b.weight"] + low_rank(2, 1.0).float()).bfloat16()
    after["c.weight"] = before["c.weight"]
    whole = torch.randint(-9, 9, (30, 40)).float()

    told = found({**before, "d.weight": whole}, {**after, "d.weight": whole.bfloat16()}, tmp_path)

    verdicts = {name: one.verdict for name, one in told.items()}
    assert verdicts == {"a.weight": "rounded", "b.weight": "moved", "c.weight": "not moved", "d.weight": "not moved"}
    assert told["a.weight"].dtypes == ("float32", "bfloat16") and not told["c.weight"].dtypes
    # bfloat16 keeps 8 bits: a relative error of at most 2 ** -9, of 2 ** -9 / sqrt(3) in the mean square at the worst.
    lost = told["a.weight"].values["rounding_over_weight"]
    assert 2**-9 / 4 < lost < 2**-9 and lost == pytest.approx(told["a.weight"].values["change_over_weight"])
    back = found(after, before, tmp_path)["a.weight"]
    assert back.verdict == "rounded" and back.dtypes == ("bfloat16", "float32")


def test_directions_that_are_all_say_nothing(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.randn(8, 40, generator=generator)} for _ in range(2))

    values = found(a, b, tmp_path, top=10)["w"].values

    assert values["change_in_top_left"] == pytest.approx(1) == values["change_in_top_left_chance"]
    assert np.isnan(values["change_in_top_left_over_chance"]) and np.isnan(values["top_left_overlap"])
    assert values["change_in_top_right_over_chance"] > 0 and 0 < values["top_right_overlap"] < 1
