"""`lightning-lowrank coordinate-check`: networks of several widths, in standard parametrisation and in muP.

Oracles: scipy's regression, numpy's norms and products of inputs and weights from a training by hand.
"""

import json
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.coordinate import mlp_mup, mlp_standard
from lightning_lowrank.analysis import coordinates
from lightning_lowrank.analysis.cli import main
from lightning_lowrank.analysis.coordinates import Power, power
from lightning_lowrank.analysis.widths import widths_of
from tests.trainings import Classifier, digits

SMALL = ["--widths", "32,64,128", "--seeds", "2"]


def found(capsys: pytest.CaptureFixture[str], function: str, *more: str) -> dict[str, Any]:
    main(["coordinate-check", function, *SMALL, *more, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("network", ["mlp", "transformer"])
def test_standard_parametrisation_grows_and_mup_does_not(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    standard, mup = (found(capsys, f"benchmarks.coordinate:{network}_{way}") for way in ("standard", "mup"))
    wide = [name for name in standard if (network, name) != ("mlp", "0")]  # the inputs of that one have one width

    # Two seeds and three small widths leave some of them open.
    assert {standard[name]["verdict"] for name in wide} <= {"grows", "unclear"}
    assert sum(standard[name]["verdict"] == "grows" for name in wide) > len(wide) / 2
    assert "grows" not in {mup[name]["verdict"] for name in mup}
    assert abs(np.median([mup[name]["own"]["power"] for name in mup])) < 0.25
    for name in wide:
        assert standard[name]["own"]["power"] > mup[name]["own"]["power"] + 0.3
        assert standard[name]["update_norm"]["power"] > 0.6 and abs(mup[name]["update_norm"]["power"]) < 0.25


def lightning(width: int) -> Any:
    """What the page says of a LightningModule."""
    module = Classifier(nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)), "sgd", lr=0.1)
    images, labels = digits(32).tensors
    return (
        module,
        module.configure_optimizers(),
        [(images, labels)],
        lambda module, batch: module.training_step(batch, 0),
    )


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_numbers_are_those_of_a_training_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    rows = found(capsys, f"{__name__}:lightning", "--steps", "2", "--seeds", "1")["net.2"]
    torch.manual_seed(0)
    module, *_ = lightning(64)
    images, labels = digits(32).tensors

    def inputs() -> np.ndarray:
        return module.net[:2](images).detach().double().numpy()

    def weight() -> np.ndarray:
        return module.net[2].weight.detach().double().numpy()

    x, w, gradients = inputs(), weight(), []
    for _ in range(2):
        grads = torch.autograd.grad(cross_entropy(module(images), labels), list(module.parameters()))
        gradients.append(grads[2].double().numpy())
        with torch.no_grad():
            for parameter, grad in zip(module.parameters(), grads, strict=True):
                parameter -= 0.1 * grad
    new, change = inputs(), weight() - w
    nuclear = np.linalg.svd(gradients[0], compute_uv=False)
    expected = {
        "own": np.sqrt(((new @ change.T) ** 2).mean()),
        "inherited": np.sqrt((((new - x) @ w.T) ** 2).mean()),
        "share": np.linalg.norm(new @ change.T) / np.linalg.norm(x @ w.T),
        "size": np.sqrt(((x @ w.T) ** 2).mean()),
        "weight_norm": np.linalg.norm(w, 2) / np.sqrt(10 / 64),
        "update_norm": np.linalg.norm(change, 2) / np.sqrt(10 / 64),
        "gradient_nuclear_to_spectral": nuclear.sum() / nuclear[0],
    }

    assert {name: rows[name]["means"]["64"] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_powers_are_those_of_a_regression_of_logarithms() -> None:
    values = {64: [1.0, 1.1], 128: [1.4, 1.5], 256: [2.2, 1.9]}
    x = [np.log(width) for width in values for _ in range(2)]
    truth = scipy.stats.linregress(x, np.log([value for several in values.values() for value in several]))
    fitted = power(values)

    assert (fitted.exponent, fitted.error) == pytest.approx((truth.slope, truth.stderr))


@pytest.mark.parametrize(
    ("exponent", "error", "verdict"),
    [
        *((0.5, 0.1, "grows"), (-0.5, 0.1, "shrinks"), (0.1, 0.05, "flat"), (0.1, 0.2, "unclear")),
        *((0.5, 0.2, "unclear"), (-0.3, 0.1, "unclear"), (float("nan"), float("nan"), "no power")),
    ],
)
def test_verdicts_are_as_the_page_has_them(exponent: float, error: float, verdict: str) -> None:
    assert Power(exponent, error).verdict == verdict


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, float("inf")], [float("nan"), 1.0]])
def test_there_is_no_power_of_zeros_and_of_what_is_not_finite(values: list[float]) -> None:
    assert power({64: [1.0, 1.0], 128: [1.0, 1.0], 256: values}).verdict == "no power"


def test_the_table_counts_verdicts_and_leaves_the_random_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    main(["coordinate-check", "benchmarks.coordinate:mlp_standard", *SMALL])
    text = capsys.readouterr().out

    assert "of 3 layers: grows" in text and "norm of dW" in text
    assert torch.equal(torch.get_rng_state(), before)


def few(width: int) -> Any:
    return mlp_mup(width)[:3]


def no_optimizer(width: int) -> Any:
    module, _, *others = mlp_mup(width)
    return module, None, *others


def no_batches(width: int) -> Any:
    return mlp_mup(width)._replace(batches=[])


def deeper(width: int) -> Any:
    task = mlp_standard(width)
    return task if width < 128 else task._replace(module=nn.Sequential(task.module, nn.Linear(10, 10)))


def broken(width: int) -> Any:
    return mlp_standard(width // 0)


def of_no_width() -> Any:
    return mlp_standard(64)


def no_linear(width: int) -> Any:
    module = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 10, 8), nn.Flatten())
    return mlp_standard(width)._replace(module=module, optimizer=torch.optim.SGD(module.parameters(), 0.1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:mlp"], "'nowhere' cannot be imported"),
        ([f"{__name__}:few"], r"returned a tuple; expected \(module, optimizer, batches, loss\)"),
        ([f"{__name__}:no_optimizer"], r"returned \(Sequential, NoneType, list, function\); expected"),
        ([f"{__name__}:broken"], "broken raised ZeroDivisionError: "),
        ([f"{__name__}:of_no_width"], "of_no_width cannot be called with 32: too many positional arguments"),
        ([f"{__name__}:no_batches"], "batches are empty"),
        ([f"{__name__}:deeper"], "width 128 has other linear layers than the first width: .* instead of"),
        ([f"{__name__}:no_linear"], "no linear layer with an untied weight"),
        (["benchmarks.coordinate:mlp_mup", "--steps", "0"], "--steps 0"),
        (["benchmarks.coordinate:mlp_mup", "--widths", "64,128"], "at least three different whole numbers"),
    ],
)
def test_what_cannot_be_repeated_over_widths_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["coordinate-check", *([] if "--widths" in arguments else SMALL), *arguments])


@pytest.mark.parametrize("text", ["64,128", "64,64,128", "64,128,x", "0,1,2", "", "64,-1,128"])
def test_widths_are_three_whole_numbers_at_least(text: str) -> None:
    with pytest.raises(ValueError, match="at least three different whole numbers"):
        widths_of(text)


def test_what_is_measured_is_named_in_one_place() -> None:
    images, labels = digits(8).tensors
    module, optimizer, *_ = mlp_standard(16)
    task = coordinates.Task(
        module, optimizer, [(images, labels)], lambda m, batch: cross_entropy(m(batch[0]), batch[1])
    )

    assert all(list(row) == list(coordinates.QUANTITIES) for row in coordinates.run(task, 1, 0).values())
