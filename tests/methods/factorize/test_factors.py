"""What factors begin as, what layers make of them, what becomes of them. Oracles: numpy, and torch's own layers."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lightning_lowrank import LoRA, LowRankFactorize
from lightning_lowrank.methods.factorize.factors import Factors, change_norm, energy_rank, product_spectrum
from tests.trainings import Fused, Tied, gpt2, mlp


class Kinds(nn.Module):
    """A layer of each kind that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 12, padding_idx=3)
        self.turned = Conv1D(10, 12)
        self.plain = nn.Linear(10, 8)
        self.kernel = nn.Conv2d(1, 5, 3, stride=2, padding=1, padding_mode="circular")
        self.line = nn.Conv1d(5, 6, 2, dilation=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.plain(torch.tanh(self.turned(self.table(x)))))
        x = self.line(torch.tanh(self.kernel(x[:, None])).mean(2))
        return self.head(x.mean(-1))


TOKENS = torch.arange(40).reshape(4, 10) % 17
LAYERS = ("table", "turned", "plain", "kernel", "line")
MODELS: dict[str, Any] = {"kinds": Kinds, "mlp": lambda: mlp(32), "gpt2": gpt2}


def factorized(net: nn.Module, **options: Any) -> nn.Module:
    LowRankFactorize(**{"rank": 2, "match": "*weight"} | options).prepare(net)
    return net


def thin(net: nn.Module, layer: str) -> list[np.ndarray]:
    found: Any = net.get_submodule(layer)
    return [getattr(found, f"weight_{part}").detach().flatten(1).numpy() for part in ("A", "B")]


def test_thin_layers_do_what_a_layer_of_their_product_does() -> None:
    net = factorized(Kinds(), match=[f"{layer}.weight" for layer in LAYERS])
    dense = Kinds()
    dense.load_state_dict(LowRankFactorize.dense_state_dict(net))

    found, expected = net(TOKENS), dense(TOKENS)
    found.square().sum().backward()
    expected.square().sum().backward()

    assert_close(found, expected)
    for layer in LAYERS:
        own: Any = net.get_submodule(layer)
        a, b, s = own.weight_A.detach(), own.weight_B.detach().flatten(1), own.weight_s.detach()
        g = dense.get_submodule(layer).weight.grad.flatten(1)
        assert_close(own.weight_A.grad, g @ b.T * s, rtol=1e-4, atol=1e-5)
        assert_close(own.weight_B.grad.flatten(1), s[:, None] * (a.T @ g), rtol=1e-4, atol=1e-5)
        assert_close(own.weight_s.grad, (a.T @ g @ b.T).diagonal(), rtol=1e-4, atol=1e-5)


def test_tied_weights_are_told_the_mode_that_takes_them() -> None:
    with pytest.raises(
        ValueError, match=r"\['first', 'second'\]; with mode='module', layers of one kind can share"
    ) as told:
        factorized(Tied(), match=None, rank=0.5, mode="parametrize")
    assert "mode='parametrize'" not in str(told.value)

    assert factorized(Tied(), match="first.weight", rank=2).first.weight_A.shape[1] == 2


def test_an_attention_that_has_two_names_is_read_as_under_one() -> None:
    net = nn.ModuleDict({"one": nn.MultiheadAttention(8, 2)})
    net["other"] = nn.ModuleDict({"same": net["one"]})

    with pytest.raises(ValueError, match=r"'one\.out_proj\.weight': NonDynamicallyQuantizableLinear uses the weight"):
        factorized(net, match="one.out_proj.weight")


@pytest.mark.parametrize("mode", ["module", "parametrize"])
def test_the_best_approximation_is_what_factors_begin_as(mode: str) -> None:
    net = mlp(32)
    weight = net[0].weight.detach().double().numpy()
    u, s, vt = np.linalg.svd(weight, full_matrices=False)

    factorized(net, rank=5, mode=mode)

    np.testing.assert_allclose(net[0].weight.detach().numpy(), u[:, :5] * s[:5] @ vt[:5], atol=1e-6)


def test_spectral_factors_are_drawn_with_the_top_of_the_spectrum() -> None:
    net = mlp(32)
    weight = net[0].weight.detach().double().numpy()
    values = np.linalg.svd(weight, compute_uv=False)[:5]

    factorized(net, rank=5, init="spectral")

    left, right = thin(net, "0")
    np.testing.assert_allclose(left.T @ left, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(right @ right.T, np.eye(5), atol=1e-5)
    found = net[0].weight.detach().numpy()
    np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False)[:5], values, rtol=1e-5)
    assert abs((found * weight).sum()) < 0.3 * np.linalg.norm(found) * np.linalg.norm(weight)


@pytest.mark.parametrize("share", [0.3, 0.95, 1.0])
def test_the_energy_rank_is_the_least_that_holds_the_share(share: float) -> None:
    matrix = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    energies = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2

    rank = energy_rank(matrix, share)

    assert energies[:rank].sum() >= (share - 1e-12) * energies.sum()
    assert energies[: rank - 1].sum() < share * energies.sum()
    assert energy_rank(torch.zeros(4, 5), share) == 1


def test_numbers_of_products_are_those_of_the_dense_matrices() -> None:
    torch.manual_seed(0)
    before, step = (Factors(torch.randn(9, 3), torch.rand(3), torch.randn(3, 7)) for _ in range(2))
    after = Factors(*(one + 1e-4 * two for one, two in zip(before, step, strict=True)))
    dense = [(f.left.double() * f.scale.double() @ f.right.double()).numpy() for f in (before, after)]

    assert_close(change_norm(before, after).item(), np.linalg.norm(dense[1] - dense[0], 2), rtol=1e-6, atol=0)
    assert_close(product_spectrum(before).numpy(), np.linalg.svd(dense[0], compute_uv=False)[:3])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", ["module", "parametrize"])
def test_dense_weights_come_back_under_their_keys(mode: str, model: str) -> None:
    net = MODELS[model]().eval()
    inputs = TOKENS if model == "kinds" else torch.rand(4, 64)
    keys, classes = list(net.state_dict()), [type(layer) for layer in net.modules()]
    order = [name for name, _ in net.named_parameters()]
    factorized(net, match=None, mode=mode)
    before = net(inputs)
    state = LowRankFactorize.dense_state_dict(net)

    assert LowRankFactorize.densify(net) is net

    assert_close(net(inputs), before, rtol=1e-4, atol=1e-5)
    assert list(net.state_dict()) == keys
    assert [name for name, _ in net.named_parameters()] == order
    assert [type(layer) for layer in net.modules()] == classes
    assert_close(state, dict(net.state_dict()), rtol=0, atol=0)


def test_copies_have_factors_of_their_own() -> None:
    net, x = factorized(mlp(32)), torch.rand(3, 64)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        before = net(x)
        with torch.no_grad():
            other[0].weight_A.add_(1.0)
        assert_close(net(x), before)
        assert not torch.allclose(other(x), before)
        assert list(LowRankFactorize.densify(other).state_dict()) == list(mlp(32).state_dict())


def test_tied_layers_share_their_factors_and_stay_tied() -> None:
    net, x = factorized(Tied(), match="first.weight"), torch.rand(3, 64)
    before = net(x)

    assert net.second.weight_A is net.first.weight_A
    LowRankFactorize.densify(net)
    assert net.first.weight is net.second.weight
    assert_close(net(x), before, rtol=1e-4, atol=1e-5)


def test_a_fast_path_that_reads_weights_finds_them() -> None:
    net, x = Fused().eval(), torch.rand(4, 64)
    factorized(net, match="*linear*.weight")

    with torch.no_grad():
        fast = net(x)

    assert_close(fast, net(x).detach(), rtol=1e-4, atol=1e-5)


def test_what_saves_nothing_or_is_read_directly_is_left_alone() -> None:
    small, fused = factorized(mlp(32), rank=9), factorized(Fused(), match=None)

    assert [name for name, _ in small.named_parameters() if name.endswith("weight")] == ["4.weight"]
    names = [name for name, _ in fused.named_parameters()]
    assert any(name.endswith("linear1.weight_A") for name in names)
    assert any(name.endswith("in_proj_weight") for name in names)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"rank": 0}, "rank=0 must be a whole number"),
    "whole share": ({"rank": 1.0}, "rank=1.0 must be a whole number"),
    "true": ({"rank": True}, "rank=True"),
    "energy": ({"rank": "energy:1.5"}, "rank='energy:1.5'"),
    "no energy": ({"rank": "energy:much"}, "rank='energy:much'"),
    "word": ({"rank": "small"}, "rank='small'"),
    "no patterns": ({"rank": {}}, "must not be empty"),
    "patterns twice": ({"rank": {"*": 2}, "match": "*"}, "match must not be given"),
    "init": ({"init": "pissa"}, "init is 'svd' or 'spectral'"),
    "mode": ({"mode": "both"}, "mode is 'module' or 'parametrize'"),
    "when": ({"when": "later"}, "when is 'start' or 'stable_rank_converged'"),
    "orthogonality": ({"orthogonality": "hard"}, "orthogonality is 'soft' or 'stiefel' or None"),
    "weight": ({"weight": 0.0}, "weight=0.0 must be a number above 0"),
    "bound": ({"max_update": -1.0}, "max_update=-1.0 must be a number above 0"),
    "seed": ({"seed": -1}, "seed=-1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_option_out_of_its_range_is_refused(case: str) -> None:
    options, message = REFUSED[case]

    with pytest.raises(ValueError, match=message):
        LowRankFactorize(**options)


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(50, 20, max_norm=1.0), nn.Linear(20, 20))


IMPOSSIBLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing fits": (lambda: mlp(32), {"match": "*wieght"}, "matches nothing"),
    "saves nothing": (lambda: mlp(32), {"rank": 0.9}, "would not be smaller"),
    "attention": (Fused, {"match": "*in_proj_weight"}, "uses the weight without calling the layer; mode='parametrize'"),
    "groups": (lambda: nn.Conv2d(8, 8, 3, groups=2), {"match": "weight"}, "a grouped convolution"),
    "padding": (Kinds, {"match": "table.weight", "init": "spectral"}, "an embedding with padding_idx"),
    "max_norm": (embedding, {"match": "0.weight"}, "an embedding with max_norm"),
    "adapter": (lambda: LoRA(2).prepare(net := mlp(32)) or net, {}, "has an adapter, '0.lora_A'"),
    "other options": (lambda: factorized(mlp(32), rank=3), {}, "is already factorized"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_factorized_is_refused_by_name_and_left_as_it_was(case: str) -> None:
    make, options, message = IMPOSSIBLE[case]
    net = make()
    keys = list(net.state_dict())

    with pytest.raises(ValueError, match=message):
        factorized(net, **options)
    assert list(net.state_dict()) == keys
