"""Weight matching: planted permutations are found, what may not change places is refused, and functions stay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from examples.char_transformer import CharTransformer
from lightning_lowrank.analysis.connect.matching import matched
from lightning_lowrank.models.tracing import traced
from lightning_lowrank.models.unit_groups import Binding, Group, groups_of


class Convolutional(nn.Module):
    """Norms, a residual stream, a depthwise convolution, channels that are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise, self.mix = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x.view(-1, 1, 8, 8))))
        x = x + self.mix(self.depthwise(x))
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


class Encoder(nn.Module):
    """Torch's own transformer layers, before and after their norms, on learnt places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(8, 12), nn.Parameter(torch.randn(8, 12))
        self.first = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
        self.second = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embed(x.view(-1, 8, 8)) + self.places)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 9), nn.GELU(), nn.Linear(9, 10))


NETWORKS: list[Callable[[], nn.Module]] = [mlp, Convolutional, Encoder]


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = make().double().eval()
    for norm in (layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return module


def outputs_of(module: nn.Module) -> Callable[..., Tensor]:
    inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).double()
    return lambda state: functional_call(module, dict(state), (inputs,)).detach()


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_a_network_whose_units_changed_places_is_put_back(make: Callable[[], nn.Module]) -> None:
    module = made(make)
    original = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    shuffled = dict(original)
    generator = torch.Generator().manual_seed(1)
    for group in traced(module):
        group.permute(shuffled, torch.randperm(group.size, generator=generator))
    assert any(not torch.equal(shuffled[name], original[name]) for name in original)

    found = matched(original, shuffled, traced(module), outputs_of(module))

    assert_close(found.state, original, rtol=0, atol=0)
    assert found.dropped == [] and found.deviation < 1e-12


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_every_matrix_belongs_to_a_group(make: Callable[[], nn.Module]) -> None:
    module = made(make)

    bound = {binding.name for group in traced(module) for binding in group.bindings}

    assert {name for name, p in module.named_parameters() if p.ndim > 1} <= bound


def test_two_networks_come_nearer_and_compute_the_same() -> None:
    a, b = made(mlp, 1), made(mlp, 2)
    states = a.state_dict(), b.state_dict()

    found = matched(*states, traced(a), outputs_of(a))

    before, after = (sum(float((states[0][n] * s[n]).sum()) for n in states[0]) for s in (states[1], found.state))
    assert after > before
    assert_close(outputs_of(a)(found.state), outputs_of(a)(states[1]))


def test_a_transformer_without_a_rule_for_its_attention_keeps_its_function() -> None:
    torch.manual_seed(0)
    a, b = (CharTransformer(20, depth=1, width=16, heads=2).double().eval() for _ in range(2))
    text = torch.randint(20, (4, 16))

    found = matched(a.state_dict(), b.state_dict(), traced(a), lambda s: functional_call(a, dict(s), (text,)).detach())

    assert found.deviation < 1e-12
    assert any("heads" in name for name in found.used)


def test_units_that_may_not_change_places_are_dropped_or_refused() -> None:
    module = made(mlp)
    state = module.state_dict()
    wrong = Group("half of it", 20, (Binding("0.weight", 0),))

    found = matched(state, state, [*traced(module), wrong], outputs_of(module))

    assert found.dropped == ["half of it"]
    with pytest.raises(ValueError, match=r"permuting each group of \['half of it'\]"):
        matched(state, state, [wrong], outputs_of(module))


class Branching(nn.Module):
    """Its way depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace Branching .*--specification FILE"):
        traced(Branching())


SHAPES = {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (2, 5)}
REFUSED: dict[str, tuple[list[list[object]], str]] = {
    "unknown tensor": ([["1.weight", 0]], r"no tensor '1\.weight'; the tensors are \['0\.weight'"),
    "no such axis": ([["0.bias", 1]], r"is not \[tensor, axis\]"),
    "too few numbers": ([["0.bias", 0, 1]], r"is not \[tensor, axis\]"),
    "beyond the end": ([["0.bias", 0, 1, 1, 5]], "exceeds axis 0"),
    "other sizes": ([["0.weight", 0], ["2.weight", 0]], r"axes of \[2, 5\] units"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_specification_that_cannot_hold_is_refused(case: str) -> None:
    places, message = REFUSED[case]

    with pytest.raises(ValueError, match=message):
        groups_of({"hidden": places}, SHAPES)
