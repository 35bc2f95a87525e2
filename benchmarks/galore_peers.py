"""Is `GaLore` what its authors and those of Fira have published? Weights after 40 steps in float64, beside theirs.

python -m benchmarks.galore_peers

Their packages are read as they are, without the 8-bit optimizers that galore-torch imports bitsandbytes for.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lowrank import GaLore, watching
from lightning_lowrank.methods.galore.ranks import Side

STEPS, RATE, RANK, EVERY, SCALE = 40, 1e-3, 4, 10, 0.25
SHAPES = ((24, 16), (40, 24), (10, 40))


def peer(package: str, module: str) -> Any | None:
    """AdamW of a package, without its `__init__`; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return None
    empty = ModuleType(package)
    empty.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = empty
    return importlib.import_module(f"{package}.{module}").AdamW


def network() -> nn.Sequential:
    """A tall matrix, a taller one, and a wide one."""
    torch.manual_seed(0)
    layers = (nn.Linear(columns, rows, bias=False) for rows, columns in SHAPES)
    first, second, third = (layer.double() for layer in layers)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)


def trained(make: Callable[[nn.Module], torch.optim.Optimizer], *monitors: GaLore) -> Tensor:
    """All weights after training on noise."""
    net = network()
    optimizer, draw = make(net), torch.Generator().manual_seed(1)
    with watching(net, optimizer, *monitors) as watch:
        for _ in range(STEPS):
            with watch.batch():
                images = torch.randn(32, SHAPES[0][1], generator=draw, dtype=torch.float64)
                # Their guards against a division by zero are absolute: gradients of norms about 10.
                (100 * cross_entropy(net(images), torch.randint(10, (32,), generator=draw))).backward()
                optimizer.step()
                optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def of(kind: Any, eps: float, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """An AdamW of theirs or of torch."""
    silent = {} if kind is torch.optim.AdamW else {"no_deprecation_warning": True}

    def make(net: nn.Module) -> torch.optim.Optimizer:
        groups = [{"params": list(net.parameters()), **options}]
        found: torch.optim.Optimizer = kind(groups, lr=RATE, eps=eps, weight_decay=0.0, **silent)
        return found

    return make


def in_float64() -> Any:
    """Their SVD, which they make in float32."""
    return patch.object(Tensor, "float", Tensor.double)


def rows(galore: Any, fira: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What is compared: its name, ours, and theirs."""
    ours: dict[str, Any] = {"match": "*", "basis": "svd", "stagger": False}
    theirs = {"rank": RANK, "update_proj_gap": EVERY}
    plain = torch.optim.AdamW
    cases: tuple[tuple[str, Side, Any, float, Any], ...] = (
        # Whose AdamW ours acts on, and epsilon: theirs add it before the bias correction, and torch's after it.
        ("std", "auto", plain, 1e-12, nullcontext()),
        ("std", "auto", plain, 1e-12, in_float64()),
        ("left", "left", plain, 1e-12, in_float64()),
        ("right", "right", plain, 1e-12, in_float64()),
        ("full", "both", plain, 1e-12, nullcontext()),
        ("full", "both", galore, 1e-6, in_float64()),
    )
    for kind, side, base, eps, svd in cases if galore else ():
        with svd:
            them = trained(of(galore, eps, **theirs, scale=SCALE, proj_type=kind))
        words = [kind, f"eps {eps:g}", f"{'torch' if base is plain else 'its own'} AdamW"]
        title = ", ".join(words + ([] if isinstance(svd, nullcontext) else ["its SVD in float64"]))
        yield f"galore-torch: {title}", trained(of(base, eps), GaLore(RANK, EVERY, SCALE, side=side, **ours)), them
    if fira:
        with in_float64():
            them = trained(of(fira, 1e-12, **theirs, alpha=1.0, proj_type="std", correct_bias=False))
        base = of(fira, 1e-12, correct_bias=False)
        us = trained(base, GaLore(RANK, EVERY, 1.0, residual="fira", **ours))
        yield "fira: std, eps 1e-12, its own AdamW, its SVD in float64", us, them


def table() -> Table:
    """Largest differences, beside the longest way that a weight has gone."""
    found = Table("", "largest difference", "longest way", title=f"Weights after {STEPS} steps in float64")
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    galore, fira = peer("galore_torch", "adamw"), peer("fira", "fira_adamw")
    for name, kind in (("galore-torch", galore), ("fira", fira)):
        if kind is None:
            found.add_row(f"{name} is not installed: make bench", "", "")
    for name, ours, theirs in rows(galore, fira):
        found.add_row(name, f"{(ours - theirs).abs().max():.1e}", f"{(theirs - start).abs().max():.1e}")
    return found


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    Console(width=140).print(table())
