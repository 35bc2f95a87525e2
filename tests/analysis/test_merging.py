"""Merges of models: each method against a formula written out, and what they keep of changes that do not meet."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor
from torch.testing import assert_close

from lightning_lowrank.analysis.merging import METHODS, conflicts, merged
from lightning_lowrank.models.checkpoints import Checkpoint


def saved(state: dict[str, Tensor], path: Path) -> Checkpoint:
    torch.save(state, path)
    return Checkpoint(path)


def three(folder: Path) -> tuple[Checkpoint, list[Checkpoint], list[dict[str, np.ndarray]]]:
    torch.manual_seed(0)
    base = {"w": torch.randn(6, 9).double(), "b": torch.randn(6).double()}
    changes = [{name: torch.randn_like(tensor) for name, tensor in base.items()} for _ in range(3)]
    models = [
        saved({name: base[name] + change[name] for name in base}, folder / f"{i}.pt")
        for i, change in enumerate(changes)
    ]
    return saved(base, folder / "base.pt"), models, [{n: t.numpy() for n, t in change.items()} for change in changes]


def change(base: Checkpoint, models: list[Checkpoint], method: str, **options: float) -> dict[str, np.ndarray]:
    return {n: (t - base.tensor(n)).numpy() for n, t in merged(base, models, method, **options)}  # type: ignore[arg-type]


def test_mean_and_sum_are_those_of_numpy(tmp_path: Path) -> None:
    base, models, changes = three(tmp_path)

    for name in ("w", "b"):
        stacked = np.stack([one[name] for one in changes])
        assert_allclose(change(base, models, "mean")[name], stacked.mean(0), atol=1e-12)
        assert_allclose(change(base, models, "task-arithmetic", scale=0.4)[name], 0.4 * stacked.sum(0), atol=1e-12)


def test_ties_is_its_algorithm_written_out(tmp_path: Path) -> None:
    base, models, changes = three(tmp_path)

    found = change(base, models, "ties", density=0.5)["w"]

    trimmed = []
    for one in changes:
        order = np.sort(np.abs(one["w"]).ravel())[::-1]
        trimmed.append(np.where(np.abs(one["w"]) >= order[26], one["w"], 0))
    for i, j in np.ndindex(6, 9):
        entries = [t[i, j] for t in trimmed]
        sign = np.sign(sum(entries))
        kept = [e for e in entries if np.sign(e) == sign and e != 0]
        assert found[i, j] == pytest.approx(np.mean(kept) if kept else 0, abs=1e-12)


def test_dare_keeps_the_sum_on_average(tmp_path: Path) -> None:
    base, models, changes = three(tmp_path)

    draws = [change(base, models, "dare", density=0.5, scale=1.0, seed=seed)["w"] for seed in range(400)]

    total = sum(one["w"] for one in changes)
    spread = np.std(draws, axis=0) / 20
    assert np.abs(np.mean(draws, axis=0) - total).max() < 5 * spread.max()
    assert np.std(draws, axis=0).min() > 0


def test_iso_c_has_the_directions_of_the_sum_and_one_singular_value(tmp_path: Path) -> None:
    base, models, changes = three(tmp_path)

    found = change(base, models, "iso-c")["w"]

    u, s, vt = np.linalg.svd(sum(one["w"] for one in changes), full_matrices=False)
    assert_allclose(found, s.mean() * u @ vt, atol=1e-12)


def test_tsv_keeps_changes_that_do_not_meet_as_they_are(tmp_path: Path) -> None:
    base = {"w": torch.zeros(8, 8).double()}
    blocks = [torch.zeros(8, 8).double() for _ in range(2)]
    torch.manual_seed(0)
    blocks[0][:4, :4], blocks[1][4:, 4:] = torch.randn(4, 4), torch.randn(4, 4)
    models = [saved({"w": block}, tmp_path / f"{i}.pt") for i, block in enumerate(blocks)]

    found = dict(merged(saved(base, tmp_path / "base.pt"), models, "tsv"))

    assert_close(found["w"], blocks[0] + blocks[1])


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_keeps_names_shapes_and_dtypes(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"conv": torch.randn(4, 3, 3, 3).half(), "norm": torch.ones(4), "scale": torch.tensor(2.0)}
    models = [
        saved({name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in base.items()}, tmp_path / f"{i}.pt")
        for i in range(2)
    ]

    found = dict(merged(saved(base, tmp_path / "base.pt"), models, method))

    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_conflicts_are_told_from_chance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, common, own = torch.zeros(40, 60).double(), torch.randn(40, 60).double(), torch.randn(40, 60).double()
    changes = [common, common + 0.1 * torch.randn(40, 60), -common, own]
    models = [saved({"w": one.double()}, tmp_path / f"{i}.pt") for i, one in enumerate(changes)]

    found = {one.pair: one for one in conflicts(saved({"w": base}, tmp_path / "base.pt"), models, ["w"])}

    assert found[0, 1].cosine > 0.98 and found[0, 2].cosine == pytest.approx(-1)
    assert found[0, 2].overlap == pytest.approx(1)
    assert abs(found[0, 3].cosine) < 5 / 2400**0.5
    assert found[0, 3].overlap == pytest.approx(found[0, 3].chance, abs=0.1)


def test_models_that_did_not_change_have_no_overlap(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"w": torch.randn(40, 60)}
    models = [saved(one, tmp_path / f"{i}.pt") for i, one in enumerate([base, base, {"w": torch.randn(40, 60)}])]

    found = list(conflicts(saved(base, tmp_path / "base.pt"), models, ["w"]))

    assert all(np.isnan(one.overlap) and np.isnan(one.cosine) for one in found) and len(found) == 3


def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path) -> None:
    base, models, _ = three(tmp_path)
    other = saved({"w": torch.ones(6, 8), "x": torch.ones(2)}, tmp_path / "other.pt")

    with pytest.raises(ValueError, match=r"method='slerp' is unknown; choose one of \['mean'"):
        dict(merged(base, models, "slerp"))
    with pytest.raises(ValueError, match=r"other\.pt has another architecture .*'w': \(6, 8\), 'b': 'missing'"):
        dict(merged(base, [models[0], other], "mean"))
    with pytest.raises(ValueError, match="1 models given; a merge needs at least two"):
        dict(merged(base, models[:1], "mean"))
    with pytest.raises(ValueError, match=r"density=0\.5 .* only ties and dare use it"):
        dict(merged(base, models, "mean", density=0.5))
