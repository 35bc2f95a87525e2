"""Whole units as what `LotteryTicket` prunes, and the smaller module that is left of them.

Oracle: gates that autograd differentiates, in a plain loop.
"""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from examples.char_transformer import CharTransformer
from lightning_lowrank import LotteryTicket
from tests.trainings import QUIET, Attending, Fused, Ordered, Resumable, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*lightning_lowrank")


def fit(module: L.LightningModule, method: LotteryTicket, epochs: int) -> None:
    settings = QUIET | {
        "logger": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
    }
    L.Trainer(**settings, max_epochs=epochs, callbacks=[method]).fit(module)


def gated(net: nn.Sequential, x: Tensor, gates: list[Tensor]) -> Tensor:
    """The outputs of `mlp` with a gate on each hidden neuron."""
    first, second, last = net[0], net[2], net[4]
    return last(torch.relu(second(torch.relu(first(x)) * gates[0])) * gates[1])


def kept_by_autograd(share: float) -> list[Tensor]:
    """Neurons of both layers whose gates have the largest mean gradients over four steps."""
    torch.manual_seed(5)
    net = mlp(32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    sums = [torch.zeros(32), torch.zeros(40)]
    for images, labels in Resumable():
        gates = [torch.ones(32, requires_grad=True), torch.ones(40, requires_grad=True)]
        optimizer.zero_grad()
        cross_entropy(gated(net, images, gates), labels).backward()
        for row, gate in zip(sums, gates, strict=True):
            assert gate.grad is not None
            row += gate.grad.abs()
        optimizer.step()
    ranked = [row.argsort(descending=True)[: round(len(row) * (1 - share))] for row in sums]
    return [
        torch.zeros_like(row, dtype=torch.bool).index_fill(0, best, True)
        for row, best in zip(sums, ranked, strict=True)
    ]


def read(weight: Tensor) -> Tensor:
    return (weight != 0).flatten(2).any(2).any(0) if weight.ndim > 2 else (weight != 0).any(0)


def test_the_neurons_that_stay_are_those_whose_gates_matter_most() -> None:
    expected = kept_by_autograd(0.4)

    torch.manual_seed(5)
    module, method = Ordered(mlp(32)), LotteryTicket(2, 1, 0.4, scope="layer", units="neuron")
    fit(module, method, 2)

    assert_close([read(module.net[2].weight), read(module.net[4].weight)], expected)
    assert method.density == pytest.approx((19 + 24) / 72)


def test_of_all_layers_together_the_share_is_taken_and_none_loses_all() -> None:
    module, method = Ordered(mlp(32)), LotteryTicket(4, 1, 0.7, units="neuron")
    fit(module, method, 4)

    counts = [int(read(module.net[i].weight).sum()) for i in (2, 4)]
    assert sum(counts) == round(72 * 0.3**3) == 2
    assert min(counts) == 1
    assert method.density == pytest.approx(2 / 72)


class Convolutions(nn.Module):
    """Three convolutions, one of them by channel, with batch norms, and two linear layers, on 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1, stride=2),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.ReLU(),
            nn.Conv2d(12, 10, 1),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Linear(160, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.view(-1, 1, 8, 8)).flatten(1))


class Normed(nn.Module):
    """A norm over all neurons of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


EXPORTED: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, tuple[int, ...]]]] = {
    "mlp": (lambda: mlp(32), "neuron", {}),
    "convolutions": (Convolutions, "neuron", {}),
    "attention": (Attending, ("neuron", "head"), {"qkv.weight": (12, 8), "out.weight": (8, 4)}),
    "attention of torch": (
        Fused,
        ("neuron", "head"),
        {
            "layer.layers.0.self_attn.in_proj_weight": (12, 8),
            "layer.layers.0.self_attn.in_proj_bias": (12,),
            "layer.layers.1.self_attn.out_proj.weight": (8, 4),
        },
    ),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_the_exported_module_is_smaller_and_computes_the_same(name: str) -> None:
    make, units, shapes = EXPORTED[name]
    torch.manual_seed(0)
    module = Ordered(make())
    fit(module, LotteryTicket(2, 1, 0.5, units=units), 2)
    images, labels = next(iter(Resumable()))
    keys = list(module.net.state_dict())

    smaller = LotteryTicket.export(module.net, images)

    module.net.eval()
    expected = module.net(images).detach()
    assert_close(smaller.eval()(images), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert num_parameters(smaller) < 0.9 * num_parameters(module.net)
    assert {key: tuple(smaller.state_dict()[key].shape) for key in shapes} == shapes
    assert list(smaller.state_dict()) == keys
    cross_entropy(smaller.train()(images), labels).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in smaller.parameters())


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_what_layers_say_of_their_size_is_the_size_that_they_have() -> None:
    torch.manual_seed(0)
    net = Convolutions()
    for place, count in ((3, 3), (8, 5)):
        with torch.no_grad():
            net.body[place].weight[:, :count] = 0

    smaller: Any = LotteryTicket.export(net, torch.rand(4, 64))

    assert [(one.in_channels, one.out_channels, one.groups) for one in smaller.body if isinstance(one, nn.Conv2d)] == [
        (1, 5, 1),
        (5, 7, 1),
        (7, 7, 7),
        (7, 10, 1),
    ]
    assert [one.num_features for one in smaller.body if isinstance(one, nn.BatchNorm2d)] == [5, 7]
    assert smaller.body[1].running_mean.shape == (5,)


def test_channels_that_were_flattened_go_with_their_places() -> None:
    net = Convolutions()
    with torch.no_grad():
        net.head[0].weight[:, 16:48] = 0

    smaller: Any = LotteryTicket.export(net, torch.rand(4, 64))

    assert smaller.body[8].out_channels == 8
    assert smaller.head[0].weight.shape == (24, 128)


def test_parts_of_a_model_that_cannot_be_traced_are_exported() -> None:
    torch.manual_seed(0)
    model = CharTransformer(30, depth=2, width=16, heads=4)
    with torch.no_grad():
        model.blocks[0].out.weight[:, :8] = 0
        model.blocks[1].mlp[2].weight[:, ::2] = 0
    text = torch.randint(30, (3, 20))

    smaller: Any = LotteryTicket.export(model, text)

    assert smaller.blocks[0].qkv.weight.shape == (24, 16) and smaller.blocks[0].heads == 2
    assert smaller.blocks[1].mlp[0].out_features == 32 and smaller.blocks[1].heads == 4
    assert_close(smaller(text), model(text), rtol=0, atol=1e-6)


SEVERAL: dict[str, Callable[[], dict[str, Tensor]]] = {
    "none": dict,
    "causal": lambda: {"attn_mask": torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)},
    "by head": lambda: {"attn_mask": torch.randn(3 * 4, 6, 6)},
    "padding": lambda: {"key_padding_mask": torch.arange(6) >= torch.tensor([[6], [4], [3]])},
}


class Alone(nn.Module):
    """An attention of torch and its masks."""

    def __init__(self, masks: dict[str, Tensor], **options: Any) -> None:
        super().__init__()
        self.attention, self.masks = nn.MultiheadAttention(16, 4, **options), masks

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False, **self.masks)[0]


@pytest.mark.parametrize("options", [{"batch_first": True}, {"batch_first": True, "bias": False}, {}])
@pytest.mark.parametrize("masks", SEVERAL)
def test_attention_of_torch_does_with_fewer_heads_what_it_did(masks: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Alone(SEVERAL[masks](), **options)
    x = torch.randn(3, 6, 16) if options else torch.randn(6, 3, 16)
    for heads in (slice(4, 8), slice(12, 16)):
        with torch.no_grad():
            net.attention.out_proj.weight[:, heads] = 0
        smaller: Any = LotteryTicket.export(net, x)
        assert_close(smaller(x), net(x), rtol=0, atol=1e-6)

    again: Any = LotteryTicket.export(masked_heads(smaller), x)
    assert smaller.attention.in_proj_weight.shape == (24, 16) and smaller.attention.num_heads == 2
    assert again.attention.in_proj_weight.shape == (12, 16)


def masked_heads(net: Any) -> nn.Module:
    with torch.no_grad():
        net.attention.out_proj.weight[:, :4] = 0
    return net


def masked(make: Callable[[], nn.Module], name: str) -> nn.Module:
    net = make()
    with torch.no_grad():
        net.get_parameter(name)[:, :4] = 0
    return net


NOT_EXPORTED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "whole": (lambda: mlp(32), torch.rand(2, 64), "some layer reads each unit"),
    "a norm over all": (lambda: masked(Normed, "net.3.weight"), torch.rand(2, 64), "some layer reads each unit"),
    "inputs": (lambda: mlp(32), torch.rand(2, 63), "fails on the inputs"),
}


@pytest.mark.parametrize("name", NOT_EXPORTED)
def test_what_cannot_be_made_smaller_is_refused(name: str) -> None:
    make, inputs, message = NOT_EXPORTED[name]
    net = make()

    with pytest.raises(ValueError, match=message):
        LotteryTicket.export(net, inputs)


class Asked(nn.Module):
    """Asks for the width that its layer once had."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)).abs() * 32 / self.first.out_features)


def test_a_group_without_which_something_else_is_computed_stays() -> None:
    with pytest.raises(ValueError, match="would change the outputs"):
        LotteryTicket.export(masked(Asked, "last.weight"), torch.rand(2, 64))


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: LotteryTicket(2, 1, units="channel"), "units='channel'"),  # type: ignore[arg-type]
    (lambda: LotteryTicket(2, 1, units=()), "units=()"),
    (lambda: LotteryTicket(2, 1, units=("weight", "head")), "one or both of 'neuron' and 'head'"),
    (lambda: LotteryTicket(2, 1, heads={"*": 2}), "to prune these"),
    (lambda: fit(Ordered(mlp(32)), LotteryTicket(2, 1, units="head"), 1), "found no heads; name the output"),
    (lambda: fit(Ordered(mlp(32)), LotteryTicket(2, 1, units="neuron", neurons="none"), 1), "none"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_had_is_refused_before_training(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        make()


def test_an_early_bird_of_neurons_ends_its_round_when_their_gates_have_settled() -> None:
    torch.manual_seed(0)
    module = Ordered(mlp(32))
    method = LotteryTicket(2, prune=0.5, steps_per_round=400, units="neuron", early_bird=True, look_every_n_steps=5)
    settings = QUIET | {
        "logger": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(**settings, max_steps=1000, max_epochs=-1, callbacks=[method])
    trainer.fit(module)

    assert 420 <= trainer.global_step < 800
    assert method.round == 1 and method.density == pytest.approx(0.5)
