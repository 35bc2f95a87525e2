"""A dense run in which weights are factorized: when, at which ranks; resumed to the bit. Oracle: numpy."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_lowrank import LowRankFactorize, watching
from tests.processes import together
from tests.trainings import QUIET, InOrder, MemoryLogger, Ordered, Resumable, fitted, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")

# Three samples, or five of ranks that move little.
MEASURED: dict[str, Any] = {"rank": "measured", "match": ["net.0.weight", "net.2.weight"], "every_n_steps": 2}
SETTLED: dict[str, Any] = {"when": "stable_rank_converged", "match": ["net.0.weight", "net.2.weight"]}
WAYS = {"measured": MEASURED, "settled": SETTLED | {"every_n_steps": 1}}
MANIFOLD = MEASURED | {"orthogonality": "stiefel"}


class Decaying(Ordered):
    """Matrices and vectors in groups of their own; a rate at which updates have few directions."""

    def __init__(self) -> None:
        super().__init__(mlp(32))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        sides = [[p for p in self.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False)]
        return torch.optim.AdamW([{"params": sides[0], "weight_decay": 0.1}, {"params": sides[1]}], lr=1e-3)


class Kept(L.Callback):
    """The first weight before and after each batch that it is dense in."""

    def __init__(self) -> None:
        self.weights: list[np.ndarray] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if not hasattr(pl_module.net[0], "weight_A"):
            self.weights.append(pl_module.net[0].weight.detach().double().numpy().copy())


def fit(way: str, *callbacks: L.Callback, resume: Path | None = None, **options: Any) -> tuple[Any, L.Trainer]:
    L.seed_everything(3, verbose=False)
    module = Decaying()
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = QUIET | {"max_epochs": 3, "logger": MemoryLogger(), "num_sanity_val_steps": 0}
    method = LowRankFactorize(**WAYS.get(way, MANIFOLD))
    trainer = L.Trainer(**settings | {"enable_checkpointing": keeps} | options, callbacks=[method, *callbacks])
    trainer.fit(module, ckpt_path=resume)
    assert method.failures == 0
    return module, trainer


def left(module: Any, trainer: L.Trainer) -> dict[str, Any]:
    return {"weights": module.state_dict(), "optimizers": [o.state_dict() for o in trainer.optimizers]}


def test_the_measured_rank_is_that_of_what_three_samples_changed() -> None:
    kept = Kept()

    module, trainer = fit("measured", kept)

    assert len(kept.weights) == 7
    energies = np.linalg.svd(kept_after(kept.weights, 7) - kept.weights[0], compute_uv=False) ** 2
    rank = int((energies.cumsum() < 0.95 * energies.sum()).sum()) + 1
    assert len(module.net[0].weight_s) == rank < 21
    sizes = [[p.ndim for p in group["params"]] for group in trainer.optimizers[0].param_groups]
    assert sizes[0].count(1) == 2  # the scales, in the group of the weights
    owned = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert owned == {id(p) for p in module.parameters()}


def kept_after(weights: list[np.ndarray], steps: int) -> np.ndarray:
    """What the first weight is after so many steps, from a run without the callback."""
    L.seed_everything(3, verbose=False)
    module = Decaying()
    L.Trainer(**QUIET | {"max_steps": steps, "logger": False, "num_sanity_val_steps": 0}).fit(module)
    np.testing.assert_array_equal(weights[0], mlp_start())
    return module.net[0].weight.detach().double().numpy()


def mlp_start() -> np.ndarray:
    L.seed_everything(3, verbose=False)
    return Decaying().net[0].weight.detach().double().numpy()


def test_settled_ranks_are_the_stable_ranks_rounded_up() -> None:
    kept = Kept()

    module, _ = fit("settled", kept)

    weights = [*kept.weights[1:], kept_after(kept.weights, len(kept.weights))]
    values = [np.linalg.svd(weight, compute_uv=False) for weight in weights]
    ranks = [(v**2).sum() / v[0] ** 2 for v in values]
    assert max(ranks[-5:]) <= 1.05 * min(ranks[-5:])
    assert len(kept.weights) == 6 or not max(ranks[-6:-1]) <= 1.05 * min(ranks[-6:-1])
    assert len(module.net[0].weight_s) == np.ceil(ranks[-1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [1, 5, 6, 7, 9])
def test_a_run_that_is_stopped_and_resumed_is_the_same_to_the_bit(stop: int, way: str, tmp_path: Path) -> None:
    expected = left(*fit(way))
    fit(way, ModelCheckpoint(tmp_path, every_n_train_steps=stop), max_steps=stop)
    (path,) = tmp_path.glob("*.ckpt")

    found = left(*fit(way, resume=path))

    assert_close(found, expected, rtol=0, atol=0)


def looped(num_batches: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
    L.seed_everything(3, verbose=False)
    module, batches, method = Decaying(), list(Resumable()) * 3, LowRankFactorize(**MEASURED)
    method.prepare(module)
    if state is not None:
        module.load_state_dict(state["weights"])
    optimizer = module.configure_optimizers()
    with watching(module, optimizer, method) as watch:
        if state is not None:  # the factors are in the optimizer now
            watch.load_state_dict(state["watch"])
            optimizer.load_state_dict(state["optimizer"])
        for images, labels in batches[0 if state is None else state["at"] : num_batches]:
            with watch.batch():
                optimizer.zero_grad()
                watch.loss(cross_entropy(module(images), labels)).backward()
                optimizer.step()
        kept = {"weights": module.state_dict(), "optimizer": optimizer.state_dict()}
        return copy.deepcopy(kept | {"watch": watch.state_dict(), "at": num_batches})


@pytest.mark.parametrize("stop", [3, 8])
def test_a_loop_goes_on_with_the_state_of_its_optimizer_loaded_last(stop: int) -> None:
    whole = looped(12)

    resumed = looped(12, looped(stop))

    for key in ("weights", "optimizer"):
        assert_close(resumed[key], whole[key], rtol=0, atol=0)


def in_processes(rank: int, size: int, root: Path) -> str:
    try:
        fitted(InOrder(rank, size), [LowRankFactorize("measured")], False, size)
    except ValueError as error:
        return str(error)
    return "trained"


def test_on_several_processes_it_is_refused(tmp_path: Path) -> None:
    assert all("DDP would not synchronise gradients" in said for said in together(in_processes, tmp_path))


def test_what_would_not_follow_a_change_in_mid_run_is_refused() -> None:
    with pytest.raises(ValueError, match="WeightAveraging"):
        fit("measured", WeightAveraging())
    with pytest.raises(ValueError, match="too coarse for orthonormal columns"):
        fit("measured in half precision on the manifold", precision="bf16-true")
    with pytest.raises(ValueError, match="barebones"):
        L.Trainer(barebones=True, max_epochs=1, accelerator="cpu", callbacks=[LowRankFactorize(**MEASURED)]).fit(
            Decaying()
        )


def test_weights_that_are_not_finite_stay_dense() -> None:
    class Poisoned(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            with torch.no_grad():
                pl_module.net[0].weight.fill_(torch.nan)

    module, _ = fit("measured", Poisoned())

    assert "net.0.weight" in module.state_dict()
