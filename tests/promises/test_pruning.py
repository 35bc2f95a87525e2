"""Weights that a hook computes before each call: pruned by Lightning's callback in mid-run, or under older norms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.utils.hooks import RemovableHandle

from lightning_lowrank import (
    ConcentrationMonitor,
    Displacement,
    Every,
    GradientAnatomyMonitor,
    Monitor,
    MultifractalMonitor,
    Probe,
    RankMonitor,
)
from tests.processes import together
from tests.trainings import Classifier, ImageNet, InOrder, MemoryLogger

EPOCHS, BATCHES = 3, 8
OLD_NORMS = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*is deprecated")


class Seen(L.Callback):
    """What a layer multiplied by, its gradient, and how far it moved, from PyTorch's own hooks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.hook: RemovableHandle | None = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.get_submodule(self.name).register_forward_hook(self.keep)

    def keep(self, layer: nn.Module, *_: Any) -> None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self.weights.append(weight.detach().clone())
        if self.hook is not None:  # a parameter would keep it
            self.hook.remove()
        self.hook = weight.register_hook(lambda gradient: self.gradients.append(gradient.detach().clone()))

    def masks(self) -> list[Tensor]:
        return [weight != 0 for weight in self.weights]


def monitors() -> list[Monitor]:
    return [
        RankMonitor(
            ["weights", "gradients", "updates"],
            ["stable_rank", "frobenius_norm"],
            every_n_steps=1,
            per_site=True,
            detail="all",
        ),
        Monitor([Probe("displacement", Displacement(), ("frobenius_norm",), Every(1))], per_site=True, detail="all"),
        GradientAnatomyMonitor(every_n_steps=1, per_site=True, detail="all"),
        ConcentrationMonitor(every_n_steps=1, densities=[0.3], detail="all"),
        MultifractalMonitor(every_n_steps=1, per_site=True, detail="all"),
    ]


def fit(module: L.LightningModule, *callbacks: L.Callback) -> MemoryLogger:
    logger = MemoryLogger()
    L.seed_everything(0, verbose=False)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    L.Trainer(**quiet, max_epochs=EPOCHS, log_every_n_steps=1, logger=logger, callbacks=list(callbacks)).fit(module)
    return logger


def pruning(*layers: nn.Module) -> ModelPruning:
    """A third of what is left of the weights after each epoch."""
    return ModelPruning("l1_unstructured", [(layer, "weight") for layer in layers], amount=0.33)


def stable_rank(matrix: Tensor) -> float:
    values = np.linalg.svd(matrix.flatten(1).double().numpy(), compute_uv=False)
    return float((values**2).sum() / values[0] ** 2)


MODULES: dict[str, tuple[Callable[[], Classifier], str]] = {
    "linear": (Classifier, "net.0"),
    "convolution": (lambda: Classifier(ImageNet()), "net.convolution"),
}


@pytest.mark.parametrize("case", MODULES)
def test_pruning_in_mid_run_loses_no_curve_and_what_is_in_use_is_read(case: str) -> None:
    make, name = MODULES[case]
    module, watching = make(), monitors()
    layer = module.get_submodule(name)
    seen = Seen(name)
    head = module.get_submodule("net.head" if case == "convolution" else "net.2")
    logger = fit(module, seen, pruning(layer, head), *watching)
    steps = EPOCHS * BATCHES

    assert [monitor.failures for monitor in watching] == [0] * len(watching)
    assert not [tag for tag in logger.curves() if "_orig" in tag]
    per_site = [curve for tag, curve in logger.curves().items() if tag.endswith(f"{name}.weight")]
    assert per_site and {len(curve) for curve in per_site if len(curve) > 2} <= {steps, steps - 1}
    expected = [stable_rank(weight) for weight in seen.weights]
    assert list(logger.curve(f"weight_stable_rank/{name}.weight").values()) == pytest.approx(expected, rel=1e-4)
    masked = [stable_rank(g * m) for g, m in zip(seen.gradients, seen.masks(), strict=True)]
    assert list(logger.curve(f"gradient_stable_rank/{name}.weight").values()) == pytest.approx(masked, rel=1e-3)
    moves = [float((later - first).norm()) for first, later in zip(seen.weights, seen.weights[1:], strict=False)]
    found = list(logger.curve(f"update_frobenius_norm/{name}.weight").values())
    within = [i for i in range(steps - 1) if (i + 1) % BATCHES]
    assert [found[i] for i in within] == pytest.approx([moves[i] for i in within], rel=1e-3)
    distances = [float((weight - seen.weights[0]).norm()) for weight in seen.weights]
    assert list(logger.curve(f"displacement_frobenius_norm/{name}.weight").values()) == pytest.approx(
        distances, rel=1e-4, abs=1e-6
    )


def test_the_anatomy_of_a_pruned_layer_is_that_of_the_gradient_of_what_it_multiplies_by() -> None:
    module, seen = Classifier(), Seen("net.0")
    monitor = GradientAnatomyMonitor(every_n_steps=1, per_site=True, detail="all")
    logger = fit(module, seen, pruning(module.net[0], module.net[2]), monitor)
    curve = logger.curve("anatomy_gradient_stable_rank/net.0.weight")

    assert max(logger.curve("anatomy_deviation/net.0.weight").values()) < 1e-4
    assert list(curve.values()) == pytest.approx([stable_rank(g) for g in seen.gradients], rel=1e-3)


def test_shares_of_the_learning_are_of_what_is_left() -> None:
    """Masked weights are in no mask of the largest, and have no update, whatever momentum and decay do below."""
    module, monitor = (
        Classifier(optimizer="adamw", weight_decay=0.1),
        ConcentrationMonitor(every_n_steps=1, densities=[0.9], detail="all"),
    )
    logger = fit(module, pruning(module.net[0], module.net[2]), monitor)
    sparsity = list(logger.curve("concentration/weight_sparsity_0.99").values())
    total = sum(layer.weight.numel() for layer in (module.net[0], module.net[2]))
    zeros = sum(int((layer.weight == 0).sum()) for layer in (module.net[0], module.net[2]))

    # The last pruning comes after the last step: two epochs' worth are gone in its samples.
    assert zeros > 0.6 * total
    assert min(sparsity[2 * BATCHES :]) > 1 - 0.67**2 - 0.01
    neurons = list(logger.curve("concentration/neuron_count").values())
    assert neurons == [32] * (EPOCHS * BATCHES)


def test_pruning_is_not_disturbed() -> None:
    plain, watched = Classifier(), Classifier()
    watched.load_state_dict(plain.state_dict())
    for module, watching in ((plain, []), (watched, monitors())):
        fit(module, pruning(module.net[0], module.net[2]), *watching)

    assert plain.losses == watched.losses
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


NORMED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "a mask": lambda layer: prune.random_unstructured(layer, "weight", amount=0.4),
}


@OLD_NORMS
@pytest.mark.parametrize("case", NORMED)
def test_a_hooked_weight_is_watched_as_it_is_used(case: str) -> None:
    module, watching = Classifier(), monitors()
    NORMED[case](module.net[0])
    seen = Seen("net.0")
    logger = fit(module, seen, *watching)

    assert [monitor.failures for monitor in watching] == [0] * len(watching)
    assert not [tag for tag in logger.curves() if tag.split("/")[-1].startswith("net.0.weight_")]
    expected = [stable_rank(weight) for weight in seen.weights]
    assert list(logger.curve("weight_stable_rank/net.0.weight").values()) == pytest.approx(expected, rel=1e-4)
    assert max(logger.curve("anatomy_deviation/net.0.weight").values()) < 1e-4


def anatomy_of_a_pruned_layer(rank: int, size: int, root: Path) -> dict[str, list[float]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    prune.random_unstructured(net[0], "weight", amount=0.5)
    monitor, logger = GradientAnatomyMonitor(every_n_steps=1, per_site=True, detail="all"), MemoryLogger()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"devices": size, "strategy": "ddp" if size > 1 else "auto", "use_distributed_sampler": False}
    L.Trainer(**quiet, **settings, max_epochs=1, logger=logger, callbacks=[monitor]).fit(InOrder(rank, size, net))
    names = ("deviation", "gradient_stable_rank")
    curves = {name: list(logger.curve(f"anatomy_{name}/net.0.weight").values()) for name in names}
    return curves | {"failures": [monitor.failures]}


@pytest.mark.slow
def test_the_gradient_of_a_pruned_weight_is_that_of_all_processes(tmp_path: Path) -> None:
    alone = anatomy_of_a_pruned_layer(0, 1, tmp_path)
    first, second = together(anatomy_of_a_pruned_layer, tmp_path)

    assert [found["failures"] for found in (alone, first, second)] == [[0]] * 3
    assert max(first["deviation"]) < 1e-4
    assert len(alone["gradient_stable_rank"]) == 4
    assert first["gradient_stable_rank"] == pytest.approx(alone["gradient_stable_rank"], rel=1e-3)
