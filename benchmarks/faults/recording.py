"""Trainings, each recorded once: all numbers by step in a file, so that rules can be judged again."""

import gzip
import json
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger

import lightning_lowrank as lr
from benchmarks.faults.trainings import STEPS, Case, train
from benchmarks.overhead import quiet

SOURCES = ("gradients", "weights", "updates", "features", "optimizer_state")
STATISTICS = ("stable_rank", "effective_rank", "participation_ratio", "spectral_norm")
# Monitors by the nets that they watch: their options, and how many steps of the usual cadence lie between two samples.
COMMON: dict[str, dict[str, Any]] = {
    "RankMonitor": {"sources": SOURCES, "statistics": STATISTICS},
    "DormantUnitsMonitor": {},
    "NoiseScaleMonitor": {"times": 2},
}
OF_GPT = COMMON | {
    "RepresentationMonitor": {"match": "net.blocks.?"},
    "AttentionMonitor": {"layouts": {"*.qkv.weight": "qkv heads d"}},
    "ActivationMonitor": {"match": "net.blocks.?"},
    "ConcentrationMonitor": {"times": 2},
    "MultifractalMonitor": {"times": 2, "match": "net.blocks.2.*"},
    "CurvatureMonitor": {"times": 2, "operators": ("hessian",), "top_k": 1},
}
OF_DIGITS = COMMON | {
    "GradientAnatomyMonitor": {"times": 2},
    "MultifractalMonitor": {"times": 2},
    "CurvatureMonitor": {"times": 2, "operators": ("hessian",), "top_k": 1},
    "NTKMonitor": {"times": 2, "num_examples": 4},
}
WATCHED = {"GPT": OF_GPT, "experts": OF_GPT | {"RouterMonitor": {}}, "digits MLP": OF_DIGITS, "deep MLP": OF_DIGITS}
IDLE = ("_start", "_error", "_chance", "_count", "_rows", "_valid", "_fit", "held_out")


class Memory(Logger):
    """Keeps every number that it is handed, by tag and step."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.curves: dict[str, dict[int, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for tag, value in metrics.items():
            self.curves.setdefault(tag, {})[step or 0] = float(value)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are no curves."""


def watchers(case: Case) -> list[str]:
    """Names of the monitors that watch a training, as far as this version has them."""
    return [name for name in WATCHED.get(case.healthy, COMMON) if hasattr(lr, name)]


def monitor(name: str, case: Case) -> L.Callback:
    """One of them, without alerts."""
    options = dict(WATCHED.get(case.healthy, COMMON)[name])
    every = options.pop("times", 1) * (10 if case.steps <= STEPS else 20)
    watcher: L.Callback = getattr(lr, name)(every_n_steps=every, detail="all", per_site=True, alerts=None, **options)
    return watcher


def record(case: Case, seed: int, names: Sequence[str]) -> dict[str, dict[int, float]]:
    """All curves of one training: those of the monitors, and what was seen from outside."""
    quiet()
    L.seed_everything(seed, verbose=False)
    run, memory = case.make(), Memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(run, case.steps, *(monitor(name, case) for name in names), logger=memory)
    outside = {"loss": run.loss, "gradient_norm": run.norm, "spread": run.spread}
    curves = memory.curves | {name: dict(enumerate(values)) for name, values in outside.items() if values}
    return curves | ({"held_out": run.held_out} if run.held_out else {})


def load(case: Case, seed: int, folder: Path, names: Collection[str] | None = None) -> dict[str, dict[int, float]]:
    """The curves of a training. What no file has is recorded: watching changes nothing, so a training that is repeated
    for another monitor is the same.

    Args:
        case: What is trained.
        seed: Of all draws.
        folder: Of the records.
        names: Monitors whose curves are needed; all of them by default.
    """
    path = folder / f"{case.what.replace(', ', '-').replace(' ', '_')}-{seed}.json.gz"
    watched, curves = _read(path)
    asked = [name for name in watchers(case) if names is None or name in names]
    missing = [name for name in asked if name not in watched]
    if missing or not curves:
        more = record(case, seed, missing)
        # As words: NaN is no number's equal.
        if curves and repr(more["loss"]) != repr(curves["loss"]):
            raise ValueError(f"{path} is of another training: delete it")
        curves, watched = curves | more, [*watched, *missing]
        _write(path, {"watched": watched, "curves": curves})
    return curves


def _read(path: Path) -> tuple[list[str], dict[str, dict[int, float]]]:
    if not path.exists():
        return [], {}
    with gzip.open(path, "rt") as file:
        kept = json.load(file)
    return kept["watched"], {
        tag: {int(step): value for step, value in curve.items()} for tag, curve in kept["curves"].items()
    }


def _write(path: Path, kept: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved: a run that is stopped leaves no half of a file.
    with gzip.open(path.with_suffix(".partial"), "wt", compresslevel=3) as file:
        json.dump(kept, file)
    path.with_suffix(".partial").rename(path)


def by_quantity(curves: Mapping[str, dict[int, float]]) -> dict[str, dict[str, dict[int, float]]]:
    """Quantity -> site -> curve: single sites, and numbers of the whole model. Left out are summaries, costs, errors,
    and what says nothing of the training: chances, values at the start, numbers that never change.
    """
    summed = {tag.removesuffix("_median") for tag in curves if tag.endswith("_median")}
    summaries = {f"{tag}_{of}" for tag in summed for of in ("min", "median", "max")}
    groups = {tag.split("/")[0] for tag in summed} | {"noise", "curvature", "ntk", "concentration"}
    found: dict[str, dict[str, dict[int, float]]] = {}
    for tag, curve in curves.items():
        group, _, rest = tag.partition("/")
        is_idle = group == "lowrank" or tag in summaries or tag.split("/")[0].endswith(IDLE) or tag.endswith(IDLE)
        if is_idle or len({value for value in curve.values() if math.isfinite(value)}) < 2:
            continue
        quantity, site = (f"{group}_{rest}", "") if group in groups else (group, rest)
        found.setdefault(quantity, {})[site] = curve
    return found


def cost(curves: dict[str, dict[int, float]]) -> dict[str, float]:
    """Milliseconds of a sample, by monitor."""
    times = {tag: sorted(curve.values()) for tag, curve in curves.items() if tag.endswith("_time_ms")}
    return {tag[len("lowrank/") : -len("_time_ms")]: values[len(values) // 2] for tag, values in times.items()}
