"""Products of pairs beside the top directions of the Hessian. Oracle: numpy's least squares on whole matrices."""

import copy
import math
import pickle
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_lowrank import CurvatureMonitor, LoRA
from lightning_lowrank.methods.lora.curves import chance_in_top, share_in_top
from tests.trainings import QUIET, Classifier, Fused, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*lightning_lowrank")


def drawn(seed: int, k: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 30), (20, 4), (k, 4, 30), (k, 20, 4))
    return tuple(torch.randn(shape, generator=generator).double() for shape in shapes)


def test_the_share_is_that_of_least_squares_on_whole_matrices() -> None:
    for seed in range(5):
        a, b, da, db = drawn(seed)
        da[2], db[2] = 2 * da[1], 2 * db[1]  # one direction twice
        product = (b @ a).numpy().ravel()
        moves = np.stack([(b @ x + y @ a).numpy().ravel() for x, y in zip(da, db, strict=True)], 1)

        rest = product - moves @ np.linalg.lstsq(moves, product, rcond=1e-9)[0]

        expected = 1 - (rest @ rest) / (product @ product)
        assert share_in_top(a, b, da, db).item() == pytest.approx(expected, rel=1e-6)


def test_random_directions_have_the_share_of_chance_and_a_planted_one_has_all() -> None:
    shares = [share_in_top(*drawn(seed)).item() for seed in range(200)]

    expected = np.mean([3 * chance_in_top(*drawn(seed)[:2]).item() for seed in range(200)])
    assert np.mean(shares) == pytest.approx(expected, abs=4 * np.std(shares) / math.sqrt(200) + 0.05 * expected)
    a, b, da, db = drawn(0)
    da[0], db[0] = a, 0 * b
    assert share_in_top(a, b, da, db).item() == pytest.approx(1)


def fitted(net: nn.Module, *callbacks: Any, steps: int = 4) -> L.LightningModule:
    L.seed_everything(3, verbose=False)
    module = Classifier(net)
    L.Trainer(**QUIET, max_steps=steps, logger=False, callbacks=list(callbacks)).fit(module)
    return module


def test_a_training_says_which_part_of_each_product_is_where_the_loss_is_steep() -> None:
    curvature = CurvatureMonitor("standard", ["hessian"], top_k=2, every_n_steps=1)
    lora = LoRA(2, hessian=True, every_n_steps=1)

    module = fitted(mlp(32), curvature, lora)

    assert lora.latest is not None
    values = lora.latest.values
    assert set(values["lora_product_in_top"]) == {"net.0.weight", "net.2.weight"}
    assert all(0 < value <= 1 for value in values["lora_product_in_top"].values())
    assert all(0 < value < 0.2 for value in values["lora_product_in_top_chance"].values())
    found = curvature.top_directions()
    named = {id(p): name for name, p in module.named_parameters()}
    assert {named[id(p)] for p, _ in found} >= {"net.0.lora_A", "net.0.lora_B", "net.4.weight"}
    whole = torch.cat([part.flatten(1) for _, part in found], 1)
    torch.testing.assert_close(whole @ whole.T, torch.eye(2), atol=1e-4, rtol=0)


def test_without_directions_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hessian=True\) needs a CurvatureMonitor\('standard'\)"):
        fitted(mlp(32), LoRA(2, hessian=True))
    with pytest.raises(ValueError, match="does not track directions of the Hessian; it needs level='standard'"):
        fitted(mlp(32), LoRA(2, hessian=True), CurvatureMonitor("light"))


def test_a_copy_has_neither_the_other_monitor_nor_the_module() -> None:
    lora = LoRA(2, match="*in_proj_weight", hessian=True, every_n_steps=1)
    fitted(Fused(), CurvatureMonitor("standard", ["hessian"], top_k=1), lora, steps=1)

    for other in (copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        assert not hasattr(other, "log") and other._numbers.curvature is None
        assert other.recorders[0].probe.source is other._numbers
