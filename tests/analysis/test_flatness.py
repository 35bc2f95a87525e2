"""Flat directions of checkpoints. Oracles: numpy's eigenvalues of a least-squares problem, and counts by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from lightning_lowrank.analysis.cli import main
from lightning_lowrank.analysis.flatness import flatness
from tests.trainings import digits, mlp


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double()


def squared(module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    return {"loss": mse_loss(module(batch[0]), batch[1])}


def classified(module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    return {"loss": cross_entropy(module(batch[0]), batch[1])}


def teacher() -> nn.Sequential:
    """Three neurons, two of which are one that was split."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    for seed, parameter in enumerate(net.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = net[0].weight[1], net[0].bias[1]
        net[2].weight[:, 2] = net[2].weight[:, 1]
    return net


def task() -> Any:
    """What `--data` names: the teacher's own outputs, so that the Hessian is that of Gauss and Newton."""
    x = draw(60, 4)
    with torch.no_grad():
        y = teacher().double()(x)
    return teacher(), {"train": [(x[:50], y[:50]), (x[50:], y[50:])]}, squared


def large() -> Any:
    images, labels = digits(64).tensors
    return mlp(80), {"train": [(images, labels)]}, classified


def small() -> Any:
    images, labels = digits(64).tensors
    return mlp(4), {"train": [(images, labels)]}, classified


def test_eigenvalues_are_those_of_the_least_squares_problem() -> None:
    x = draw(40, 5)
    x[:, 3:] = x[:, :2] @ draw(2, 2)  # three directions of five
    module = nn.Linear(5, 1, bias=False)

    found = flatness(module, [(x[:30], draw(30, 1)), (x[30:], draw(10, 1))], squared)

    expected = np.linalg.eigvalsh(2 * x.numpy().T @ x.numpy() / 40)
    assert_allclose(found.eigenvalues.numpy(), expected, atol=1e-12)
    assert found.flat.shape == (5, 2) and found.negative == 0 and found.gap > 1e6
    assert_allclose((x @ found.flat).numpy(), 0, atol=1e-12)
    along, anywhere, _ = found.walked
    assert along < 1e-12 < anywhere
    assert found.shares == {"weight": pytest.approx(2 / 5)}


def test_a_saddle_has_a_negative_eigenvalue() -> None:
    def saddle(module: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        a, b, _ = module.weight[0]  # type: ignore[index, misc]
        return {"loss": (a.square() - b.square()) * batch[0].mean()}

    found = flatness(nn.Linear(3, 1, bias=False), [(torch.ones(4, 3),)], saddle)

    assert_allclose(found.eigenvalues.numpy(), [-2, 0, 2], atol=1e-12)
    assert found.negative == 1 and found.flat.shape == (3, 1)
    assert found.below(1e-3) == 1


def test_a_split_neuron_is_flat_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(teacher().state_dict(), tmp_path / "net.pt")
    files = [str(tmp_path / name) for name in ("flat.safetensors", "page.html")]

    main(
        ["flat-directions", str(tmp_path / "net.pt"), f"{__name__}:task", "-o", files[0], "--page", files[1], "--json"]
    )

    told = json.loads(capsys.readouterr().out)
    # All that a third neuron has in parameters: four weights and a bias in, two weights out.
    assert told["flat"] == 7 and told["parameters"] == 23 and told["gradient_norm"] < 1e-12
    assert told["outputs_unchanged"] == {"total": 7, "duplicates": 7, "scale": 0, "rest": 0}
    assert sum(told["shares"][name] * p.numel() for name, p in teacher().named_parameters()) == pytest.approx(7)
    assert load_file(files[0])["flat"].shape == (23, 7)
    assert "hessian_flat_share" in Path(files[1]).read_text()
    main(["flat-directions", str(tmp_path / "net.pt"), f"{__name__}:task"])
    printed = capsys.readouterr().out
    assert "7 of 23 directions are flat" in printed and "7 from duplicate or unread neurons" in printed


def test_pixels_that_are_always_black_are_flat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(small()[0].state_dict(), tmp_path / "net.pt")

    main(["flat-directions", str(tmp_path / "net.pt"), f"{__name__}:small", "--match", "0.*", "--json"])

    told = json.loads(capsys.readouterr().out)
    black = int((digits(64).tensors[0] == 0).all(0).sum())
    assert told["parameters"] == 65 * 4 and told["flat"] >= 4 * black > 0
    assert told["outputs_unchanged"] is None


REFUSED = {
    "too many for a full Hessian": ("large", []),
    "tolerance=2": ("small", ["--tolerance", "2"]),
    "matches nothing": ("small", ["--match", "9.*"]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_done_is_refused_in_words(why: str, tmp_path: Path) -> None:
    name, words = REFUSED[why]
    torch.save(globals()[name]()[0].state_dict(), tmp_path / "net.pt")

    with pytest.raises(SystemExit, match=why):
        main(["flat-directions", str(tmp_path / "net.pt"), f"{__name__}:{name}", *words])
