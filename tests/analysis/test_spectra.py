"""Spectra of checkpoints: what numpy says of the same matrices, by the names that a monitor of the module gives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

from lightning_lowrank.analysis.matrices import places
from lightning_lowrank.analysis.spectra import Row, spectra
from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.models.sites import sites
from tests.trainings import Attending, Recurrent, gpt2, mlp


def saved(module: nn.Module, folder: Path, name: str = "net.pt") -> Checkpoint:
    torch.save(module.state_dict(), folder / name)
    return Checkpoint(folder / name)


def rows(checkpoint: Checkpoint, module: nn.Module | None = None) -> dict[str, Row]:
    return {row.name: row for row in spectra(checkpoint, places(checkpoint, module))}


@pytest.mark.parametrize("make", [mlp, Recurrent, Attending, nn.GRUCell], ids=lambda make: make.__name__)
def test_names_and_shapes_tell_what_a_monitor_of_the_module_would_find(
    make: Callable[..., nn.Module], tmp_path: Path
) -> None:
    module = make(3, 5) if make is nn.GRUCell else make()

    found = rows(saved(module, tmp_path))

    assert list(found) == [label for site in sites(module) for label in site.labels]


def test_the_module_tells_how_fused_weights_divide(tmp_path: Path) -> None:
    module = gpt2()
    checkpoint = saved(module, tmp_path)

    with torch.device("meta"):
        empty = gpt2()

    assert [row for row in rows(checkpoint, empty) if row.endswith("c_attn.weight.q")]
    assert [row for row in rows(checkpoint) if row.endswith("c_attn.weight")]


def test_ranks_are_those_of_numpy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Linear(20, 30))

    found = rows(saved(module, tmp_path))

    for name, weight in (("0.weight", module[0].weight.flatten(1)), ("1.weight", module[1].weight)):
        values = np.linalg.svd(weight.detach().double().numpy(), compute_uv=False)
        share = values**2 / (values**2).sum()
        parts = values / values.sum()
        assert_allclose(found[name].values["stable_rank"], 1 / share[0], rtol=1e-6)
        assert_allclose(found[name].values["effective_rank"], np.exp(-(parts * np.log(parts)).sum()), rtol=1e-6)
        assert_allclose(found[name].values["participation_ratio"], 1 / (share**2).sum(), rtol=1e-6)
        assert found[name].values["energy_rank"] == 1 + int((share.cumsum() < 0.9).sum())
        assert found[name].singular is not None
        assert_allclose(found[name].singular.numpy(), values, rtol=1e-6)
        assert set(found[name].errors.values()) == {0.0}


def test_a_rank_over_that_of_a_gaussian_matrix_is_about_one_on_a_gaussian_matrix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(
        {"noise": torch.randn(100, 300), "one": torch.outer(torch.randn(100), torch.randn(300)).double()},
        tmp_path / "net.pt",
    )

    found = rows(Checkpoint(tmp_path / "net.pt"))

    for name in ("energy_rank", "stable_rank", "effective_rank", "participation_ratio"):
        assert 0.85 < found["noise"].values[f"relative_{name}"] < 1.15
        assert found["one"].values[name] == pytest.approx(1, abs=1e-3)


def test_a_matrix_that_is_not_finite_is_told_apart(tmp_path: Path) -> None:
    torch.save({"bad": torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), "good": torch.eye(2)}, tmp_path / "net.pt")

    found = rows(Checkpoint(tmp_path / "net.pt"))

    assert [name for name, row in found.items() if not row.finite] == ["bad"]


def test_a_large_matrix_is_sketched_with_its_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save({"w": torch.randn(80, 90)}, tmp_path / "net.pt")
    checkpoint = Checkpoint(tmp_path / "net.pt")
    (exact,) = spectra(checkpoint, places(checkpoint))

    (row,) = spectra(checkpoint, places(checkpoint), ["effective_rank", "stable_rank"], sketch_above=32)

    assert row.singular is None
    for name, error in row.errors.items():
        assert error > 0
        assert abs(row.values[name] - exact.values[name]) <= error


def test_what_a_checkpoint_is_not_of_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = saved(mlp(8), tmp_path)

    with pytest.raises(ValueError, match=r"does not fit this model: it lacks \[\]; shapes .*'0\.weight'"):
        places(checkpoint, mlp(9))
    with pytest.raises(ValueError, match=r"lacks \['weight'\]; the file has \['0\.weight'"):
        places(checkpoint, nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=r"match: 'head' matches nothing; nearest"):
        places(checkpoint, match="head")


def test_a_file_without_a_matrix_is_refused(tmp_path: Path) -> None:
    torch.save({"bias": torch.ones(3)}, tmp_path / "net.pt")

    with pytest.raises(ValueError, match=r"net\.pt contains no matrix; its tensors are \[\('bias'"):
        places(Checkpoint(tmp_path / "net.pt"))
