"""Records of trainings as the curves that rules look at."""

from collections.abc import Mapping

import numpy as np

from lightning_lowrank.tensorboard.series import Table

# What is seen from outside, under the names that `LossMonitor` gives it and that rules give what users log.
OUTSIDE = {"loss": "step_loss", "gradient_norm": "step_gradient_norm", "held_out": "held_out_loss"}
OF_THE_MODEL = ("noise", "curvature", "ntk", "concentration", "anatomy")


def tables(curves: Mapping[str, Mapping[int, float]]) -> dict[str, Table]:
    """By quantity: single sites, and numbers of the whole model; summaries and costs left out."""
    summed = {tag.removesuffix("_median") for tag in curves if tag.endswith("_median")}
    summaries = {f"{tag}_{end}" for tag in summed for end in ("min", "median", "max")}
    groups = {tag.split("/")[0] for tag in summed} | set(OF_THE_MODEL)
    found: dict[str, dict[str, Mapping[int, float]]] = {}
    for tag, curve in curves.items():
        group, _, rest = tag.partition("/")
        if tag in OUTSIDE:
            found[OUTSIDE[tag]] = {"whole model": curve}
        elif tag not in summaries and group != "lowrank" and rest:
            quantity, site = (f"{group}_{rest}", "whole model") if group in groups else (group, rest)
            found.setdefault(quantity, {})[site] = curve
    return {quantity: _table(sites) for quantity, sites in found.items()}


def _table(sites: Mapping[str, Mapping[int, float]]) -> Table:
    steps = sorted({step for curve in sites.values() for step in curve})
    rows = [[curve.get(step, np.nan) for curve in sites.values()] for step in steps]
    with np.errstate(over="ignore"):  # what is beyond float32 is infinite, as in event files
        return Table(np.array(steps, np.int64), list(sites), np.array(rows, np.float32))
