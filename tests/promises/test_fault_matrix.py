"""Every fault at everything that is read: training is as it was, and each number logged is that of what was really
there, or is missing.

Oracle: numpy's singular values, in float64, of copies that the module itself made of what it had at that moment, in an
unwatched run.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lightning_lowrank import Monitor, RankMonitor
from lightning_lowrank.monitors.rank import SOURCES
from tests.faults import FAULTS, FAULTY_STEPS, Afflicted
from tests.monitors import ANY
from tests.trainings import MemoryLogger

QUANTITIES = {
    "gradients": ("gradient",),
    "weights": ("weight",),
    "updates": ("update",),
    "displacement": ("displacement",),
    "optimizer_state": ("first_moment", "second_moment"),
    "features": ("feature",),
    "centred_features": ("centred_feature",),
    "validation_features": ("validation_feature",),
}
STATISTICS = ("effective_rank", "stable_rank", "frobenius_norm")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Run:
    """What is left of a run."""

    module: Afflicted
    bits: dict[str, Any]
    hooks: int
    logger: MemoryLogger
    monitor: Monitor | None
    warned: list[str]


def run(fault: str | None, monitor: Monitor | None = None, *others: Monitor) -> Run:
    """Train six steps, with a validation after each."""
    L.seed_everything(3, verbose=False)
    logger, module = MemoryLogger(), Afflicted(fault)
    options = {"max_steps": 6, "val_check_interval": 1, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(**options, **quiet, logger=logger, callbacks=[*filter(None, (monitor, *others))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "lightning_lowrank")
        trainer.fit(module)
    optimizer = trainer.optimizers[0]
    bits = {
        "weights and buffers": module.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "losses": torch.tensor(module.losses, dtype=torch.float64),
        "torch's generator": torch.get_rng_state(),
        "numpy's generator": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
    }
    hooks = sum(len(getattr(layer, kind)) for layer in module.modules() for kind in HOOKS)
    hooks += len(optimizer._optimizer_step_post_hooks) + len(optimizer._optimizer_step_pre_hooks)
    ours = [str(w.message) for w in caught if str(w.message).startswith("lightning_lowrank")]
    return Run(module, bits, hooks, logger, monitor, ours)


@cache
def pair(fault: str) -> tuple[Run, Run]:
    """Unwatched, and with everything watched."""
    return run(fault), run(fault, RankMonitor(tuple(SOURCES), STATISTICS, every_n_steps=1, per_site=True, detail="all"))


def numbers(matrix: NDArray[np.float64] | None) -> dict[str, float]:
    """The statistics of a matrix; NaN where there is none or it is not finite."""
    if matrix is None or not np.isfinite(matrix).all():
        return dict.fromkeys(STATISTICS, np.nan)
    if not matrix.any():
        return dict.fromkeys(STATISTICS, 0.0)
    values = np.linalg.svd(matrix / abs(matrix).max(), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return {
        "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
        "stable_rank": (values**2).sum() / values[0] ** 2,
        "frobenius_norm": np.sqrt((values**2).sum()) * abs(matrix).max(),
    }


def expected(run: Run, quantity: str) -> dict[str, dict[int, dict[str, float]]]:
    """Site -> step -> statistics of what there was."""
    read = "feature" if quantity == "centred_feature" else quantity
    seen = {site: steps for (name, site), steps in run.module.spy.seen.items() if name == read}
    if quantity == "centred_feature":
        seen = {site: {step: _centred(matrix) for step, matrix in steps.items()} for site, steps in seen.items()}
    return {site: {step: numbers(matrix) for step, matrix in steps.items()} for site, steps in seen.items()}


def _centred(rows: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    return None if rows is None or not np.isfinite(rows).all() else rows - rows.mean(0)


@pytest.mark.parametrize("fault", FAULTS)
def test_training_is_the_same_to_the_last_bit(fault: str) -> None:
    alone, watched = pair(fault)

    torch.testing.assert_close(watched.bits, alone.bits, rtol=0, atol=0)


@pytest.mark.parametrize("fault", FAULTS)
def test_training_is_the_same_and_no_hook_is_left_with_every_other_monitor(fault: str) -> None:
    alone, _ = pair(fault)

    smaller = {"curvature": {"operators": ["hessian", "gauss_newton"]}}
    others = [name for name in ANY if name != "rank"]
    watched = run(fault, *(ANY[name](every_n_steps=3, **smaller.get(name, {})) for name in others))

    torch.testing.assert_close(watched.bits, alone.bits, rtol=0, atol=0)
    assert watched.hooks == alone.hooks


@pytest.mark.parametrize("fault", FAULTS)
def test_no_hook_is_left(fault: str) -> None:
    alone, watched = pair(fault)

    assert watched.hooks == alone.hooks == 1  # the user's own


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("source", QUANTITIES)
def test_a_number_is_that_of_what_was_there_or_is_missing(source: str, fault: str) -> None:
    alone, watched = pair(fault)

    for quantity in QUANTITIES[source]:
        truth = expected(alone, quantity)
        for statistic in STATISTICS:
            known = {site: {step: n[statistic] for step, n in steps.items()} for site, steps in truth.items()}
            curves = {site: watched.logger.curve(f"{quantity}_{statistic}/{site}") for site in known}
            # A parameter that is not on the module has no point; neither has one a number that is another's.
            logged = {site: {step: curves[site].get(step, np.nan) for step in steps} for site, steps in known.items()}
            assert all(curves[site].keys() <= steps.keys() for site, steps in known.items())
            torch.testing.assert_close(logged, known, rtol=1e-5, atol=0, equal_nan=True)


def lost(alone: Run, watched: Run, quantity: str) -> int:
    """Failures of a quantity: each matrix that was not finite, and once what was not there, however long."""
    read = "feature" if quantity == "centred_feature" else quantity
    count = 0
    for (name, site), steps in alone.module.spy.seen.items():
        if name != read:
            continue
        curve = watched.logger.curve(f"{quantity}_stable_rank/{site}")
        blank = [step for step in steps if np.isnan(curve.get(step, 0.0))]
        absent = [step for step in blank if steps[step] is None]
        count += len(blank) - sum(step - 1 in absent for step in absent)
    return count


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_is_counted_and_said_once_for_each_quantity(fault: str) -> None:
    alone, watched = pair(fault)
    missing = {q: lost(alone, watched, q) for names in QUANTITIES.values() for q in names}

    assert watched.monitor.failures == sum(missing.values())
    assert list(watched.logger.curve("lowrank/rank_failures").values())[-1] == watched.monitor.failures
    said = sorted(message.split(": ")[1] for message in watched.warned)
    assert said == sorted(quantity for quantity, number in missing.items() if number)


@pytest.mark.parametrize("fault", FAULTS)
def test_once_it_is_over_the_numbers_are_back(fault: str) -> None:
    _, watched = pair(fault)

    last = {
        tag: list(curve.values())[FAULTY_STEPS[-1] + 1 :]
        for tag, curve in watched.logger.curves().items()
        if "/" in tag
    }
    assert not [tag for tag, values in last.items() if np.isnan(values).any()]
