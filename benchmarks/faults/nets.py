"""What is trained: a small GPT, the same with experts, and the nets of runs that fail by themselves."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from examples.char_transformer import Block, CharTransformer


class Norm(nn.LayerNorm):
    """A normalisation that can be switched off."""

    off = False

    def forward(self, x: Tensor) -> Tensor:
        return x if self.off else super().forward(x)


class Rounded(nn.Sequential):
    """Layers whose output can go through half precision, where numbers above 65,504 are infinite."""

    half_precision = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y.half().to(x) if self.half_precision else y


class Experts(nn.Module):
    """Mixture of experts: each token goes to the two that the router gives most weight."""

    def __init__(self, width: int, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(width, num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).topk(self.top_k)
        gates = torch.zeros(*x.shape[:-1], len(self.experts)).scatter(-1, chosen, weights.softmax(-1))
        return sum((gates[..., i, None] * expert(x) for i, expert in enumerate(self.experts)), torch.zeros_like(x))


def replaced(net: nn.Module, kind: type[nn.Module], new: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The net with something else in the place of its layers of a kind."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is kind:
                setattr(module, name, new(child))
    return net


def gpt() -> nn.Module:
    """Of 4 layers, 4 heads and width 64, on characters."""
    net = CharTransformer(100, depth=4, width=64, heads=4)
    for block in net.blocks.children():
        assert isinstance(block, Block)
        block.mlp = Rounded(*block.mlp)
    return replaced(net, nn.LayerNorm, lambda _: Norm(64))


def gpt_of_experts() -> nn.Module:
    """The same with four experts in the place of each MLP."""
    net = gpt()
    for block in net.get_submodule("blocks").children():
        block.mlp = Experts(64)
    return net


def writer(norm: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The demo's transformer in small; with something else in place of its normalisation."""
    net = CharTransformer(100, depth=4, width=32, heads=2)
    return replaced(net, nn.LayerNorm, lambda _: norm()) if norm else net


class Twin(nn.Module):
    """Features, and what is predicted from them."""

    def __init__(self) -> None:
        super().__init__()
        hidden = (nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.encoder = nn.Sequential(*hidden, nn.Linear(64, 32))
        self.predictor = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        return z, self.predictor(z)


class Convolutions(nn.Module):
    """Two of them and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.reshape(-1, 1, 8, 8)).flatten(1))


def mlp(depth: int = 3, *, bias: bool = True) -> nn.Sequential:
    """Layers of 64."""
    hidden = [part for _ in range(depth - 1) for part in (nn.Linear(64, 64, bias=bias), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(64, 10, bias=bias))
