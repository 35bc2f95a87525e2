"""`SubspaceTraining` with bases of files. Oracle: plain torch, with the coefficients as parameters."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_lowrank import SubspaceTraining
from lightning_lowrank.analysis.cli import main
from lightning_lowrank.models.basis_files import Basis
from tests.trainings import QUIET, Ordered, Resumable, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*lightning_lowrank")


class Deep(Ordered):
    """Three matrices, the same start each time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(mlp(16))


@pytest.fixture
def basis(tmp_path: Path) -> str:
    """Of six models that moved away from the start of `Deep`."""
    start, paths = Deep().state_dict(), []
    for i in range(6):
        torch.manual_seed(i)
        paths.append(str(tmp_path / f"{i}.pt"))
        torch.save({name: value + 0.05 * torch.randn_like(value) for name, value in start.items()}, paths[-1])
    torch.save(start, tmp_path / "base.pt")
    path = str(tmp_path / "basis.safetensors")
    main(["subspace", "fit", *paths, "--base", str(tmp_path / "base.pt"), "--k", "3", "-o", path])
    return path


def fit(method: SubspaceTraining, module: L.LightningModule, **options: Any) -> L.Trainer:
    trainer = L.Trainer(**QUIET | {"max_epochs": 1, "logger": False} | options, callbacks=[method])
    trainer.fit(module)
    return trainer


def test_a_run_is_that_of_plain_torch_with_coefficients_as_parameters(basis: str) -> None:
    module = Deep()
    file, start = Basis(basis), {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(SubspaceTraining(basis, k=2), module)
    SubspaceTraining.merge(module)

    shares = {name: file.share(name) for name in file.shapes}
    coefficients = {name: nn.Parameter(torch.zeros(2)) for name in start}

    def weights() -> dict[str, Tensor]:
        return {
            name: start[name] + share.mean + torch.einsum("k,k...->...", coefficients[name], share.components[:2])
            for name, share in shares.items()
        }

    plain = Deep()
    plain_optimizer: Any = plain.configure_optimizers()
    options = {key: value for key, value in plain_optimizer.defaults.items() if key != "decoupled_weight_decay"}
    optimizer = type(plain_optimizer)(coefficients.values(), **options)
    for images, labels in Resumable():
        optimizer.zero_grad()
        cross_entropy(functional_call(plain, weights(), (images,)), labels).backward()
        optimizer.step()
    assert_close(dict(module.named_parameters()), {n: w.detach() for n, w in weights().items()}, rtol=1e-4, atol=1e-5)


def test_the_model_begins_at_the_mean_of_the_others(basis: str) -> None:
    for include_mean in (True, False):
        module, start = Deep(), Deep()

        SubspaceTraining(basis, include_mean=include_mean).prepare(module)

        for (name, before), place in zip(start.named_parameters(), Basis(basis).shapes, strict=True):
            mean, (path, _, local) = Basis(basis).share(place).mean, name.rpartition(".")
            found = module.get_parameter(f"{path}.parametrizations.{local}.original").detach()
            assert_close(found, before.detach() + include_mean * mean, rtol=0, atol=1e-7)


def test_weights_stay_in_the_span_and_only_coefficients_train(basis: str) -> None:
    module, before = Deep(), Deep()
    trainer = fit(SubspaceTraining(basis, include_mean=False), module)

    trained = [p for p in module.parameters() if p.requires_grad]
    (optimizer,) = trainer.optimizers
    assert (
        sum(p.numel() for p in trained)
        == sum(Basis(basis).ks.values())
        == sum(state["exp_avg"].numel() if "exp_avg" in state else p.numel() for p, state in optimizer.state.items())
    )
    SubspaceTraining.merge(module)
    for name, p in module.named_parameters():
        change = (p - before.get_parameter(name)).detach().flatten().double()
        directions = Basis(basis).share(name).directions
        left = change - directions.T @ directions @ change
        assert change.norm() > 1e-4 and left.norm() < 1e-3 * change.norm()


def test_names_may_have_a_prefix_in_the_module(basis: str) -> None:
    module = nn.ModuleDict({"inner": Deep()})

    SubspaceTraining(basis, k=1).prepare(module)

    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        f"inner.net.{i}.parametrizations.{kind}.0.coefficients" for i in (0, 2, 4) for kind in ("weight", "bias")
    }


def test_what_train_also_names_trains_whole_and_without_the_mean(basis: str) -> None:
    for match, also in ((basis, "net.4.weight"), ("random", ["net.4.weight", "net.0.bias"]), (basis, ["*.4.*"])):
        module, start = Deep(), Deep()
        module.net[4].requires_grad_(False)  # named, so that it trains
        method = SubspaceTraining(match, k=1, train_also=also)
        method.prepare(module)

        assert torch.equal(module.net[4].weight, start.net[4].weight) and module.net[4].weight.requires_grad
        fit(method, module)

        change = (module.net[4].weight - start.net[4].weight).detach()
        assert torch.linalg.matrix_rank(change) > 1
        SubspaceTraining.merge(module)
        assert not module.net[4].weight.requires_grad and module.net[0].bias.requires_grad


def test_a_new_head_of_another_shape_trains_whole_beside_a_basis(basis: str) -> None:
    module = Deep()
    module.net[4] = nn.Linear(module.net[4].in_features, 3)

    SubspaceTraining(basis, train_also="net.4.*").prepare(module)

    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {"net.4.weight", "net.4.bias"} < trained and len(trained) == 6


def test_all_that_has_no_directions_is_what_a_star_means() -> None:
    module = Deep()
    module.net[0].bias.requires_grad_(False)

    SubspaceTraining("random", match="*weight", train_also="*").prepare(module)

    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.endswith("bias")} == {"net.2.bias", "net.4.bias"} and len(trained) == 5


def test_weights_of_before_are_loaded_into_a_layer_that_is_called_twice() -> None:
    layer = nn.Linear(64, 64)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    SubspaceTraining("random", k=2).prepare(net)

    net.load_state_dict({name: value + 1 for name, value in state.items()})

    assert_close(SubspaceTraining.merge(net).state_dict(), {name: value + 1 for name, value in state.items()})


def test_a_run_goes_on_with_the_same_basis_and_with_no_other(basis: str, tmp_path: Path) -> None:
    whole, stopped = Deep(), Deep()
    fit(SubspaceTraining(basis), whole, max_epochs=2)
    trainer = fit(SubspaceTraining(basis), stopped)
    trainer.save_checkpoint(tmp_path / "one.ckpt")

    resumed = Deep()
    again = L.Trainer(**QUIET | {"max_epochs": 2, "logger": False}, callbacks=[SubspaceTraining(basis)])
    again.fit(resumed, ckpt_path=tmp_path / "one.ckpt", weights_only=True)

    assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    other = copy.deepcopy(QUIET) | {"max_epochs": 2, "logger": False}
    with pytest.raises(ValueError, match="used other directions"):
        L.Trainer(**other, callbacks=[SubspaceTraining("random", k=3)]).fit(Deep(), ckpt_path=tmp_path / "one.ckpt")


def test_bad_input_is_refused_by_name(basis: str, tmp_path: Path) -> None:
    class Wider(Ordered):
        def __init__(self) -> None:
            super().__init__(mlp(20))

    (tmp_path / "no.safetensors").write_text("words")
    for make, message in (
        (lambda: SubspaceTraining(basis, k=0), "k=0"),
        (lambda: SubspaceTraining("nowhere.safetensors"), "there is no file nowhere"),
        (lambda: SubspaceTraining(str(tmp_path / "no.safetensors")), "cannot be read"),
        (lambda: fit(SubspaceTraining(basis), Wider()), "another architecture"),
        (lambda: SubspaceTraining(basis).prepare(nn.Linear(3, 3)), "the module lacks"),
        (lambda: fit(SubspaceTraining("random", match="nothing*"), Deep()), "matches nothing"),
        (lambda: SubspaceTraining.merge(Deep()), "has no directions"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


class Scaled(nn.Module):
    """A weight under two names, and a parameter without an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(2.0))


def test_weights_of_two_names_stay_and_parameters_without_an_axis_move(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start, paths = Scaled(), []
    for i in range(5):
        other = copy.deepcopy(start)
        for p in other.parameters():
            p.data += 0.1 * torch.randn_like(p)
        paths.append(str(tmp_path / f"{i}.pt"))
        torch.save(other.state_dict(), paths[-1])
    torch.save(start.state_dict(), tmp_path / "base.pt")
    path = str(tmp_path / "basis.safetensors")
    main(["subspace", "fit", *paths, "--base", str(tmp_path / "base.pt"), "--k", "2", "-o", path])

    for basis in (path, "random"):
        module = copy.deepcopy(start)
        SubspaceTraining(basis, k=2, include_mean=False).prepare(module)
        (coefficient,) = (p for name, p in module.named_parameters() if name.startswith("parametrizations.scale.0"))
        coefficient.data += 3

        merged = SubspaceTraining.merge(module)
        assert abs(abs(float(merged.scale.detach()) - 2) - 3) < 1e-6
        assert merged.first.weight is merged.last.weight
        assert torch.equal(merged.first.weight, start.first.weight)


def test_other_numbers_of_directions_are_named(basis: str) -> None:
    saved, narrow = Deep(), Deep()
    SubspaceTraining(basis, k=2).prepare(saved)
    SubspaceTraining(basis, k=2, match="*.4.*").prepare(narrow)

    for options in ({"k": 3}, {"k": 2, "match": "*.4.*"}):
        module = Deep()
        SubspaceTraining(basis, **options).prepare(module)
        with pytest.raises(ValueError, match=r"net\.0\.parametrizations\.weight': \(2, [03]\)"):
            module.load_state_dict(saved.state_dict())
    saved.load_state_dict(narrow.state_dict())  # the others are weights without coefficients


class Times(nn.Module):
    """A parametrization of the user's, whose parameter has the name of ours."""

    def __init__(self, coefficients: Tensor) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(coefficients)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.coefficients.sum()


@pytest.mark.parametrize("coefficients", [torch.tensor(2.0), torch.ones(5)])
def test_coefficients_of_the_users_own_are_loaded_as_ever(basis: str, coefficients: Tensor) -> None:
    def made() -> Deep:
        module = Deep()
        module.extra = nn.Linear(3, 3)
        torch.nn.utils.parametrize.register_parametrization(module.extra, "weight", Times(coefficients.clone()))
        SubspaceTraining(basis, k=2, train_also=["extra*"]).prepare(module)
        return module

    saved, module = made(), made()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter += 1
    module.load_state_dict(saved.state_dict())

    for one, other in zip(module.parameters(), saved.parameters(), strict=True):
        assert torch.equal(one, other)
