"""A plan in words and numbers."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from rich.table import Table

import lightning_lowrank
from lightning_lowrank.analysis.planning.devices import devices
from lightning_lowrank.analysis.planning.plan import Plan

UNMEASURED = "unmeasured"
# Of the first column; the second has half of it.
WIDTH = 60
# Monitors without a plan: what they take is told by their pages, in steps of the trainings that it was measured on.
OTHERS = sorted({name for name in dir(lightning_lowrank) if name.endswith("Monitor")} - {"Monitor", "RankMonitor"})


def table_of(plan: Plan) -> Table:
    """For a terminal."""
    title = f"RankMonitor() on {plan.what}: {count(plan.num_parameters)} parameters, {plan.dtype}, "
    table = Table(title=title + f"{plan.num_devices} device{'s' * (plan.num_devices > 1)}")
    table.add_column("what", max_width=WIDTH)
    table.add_column("value", max_width=WIDTH // 2)
    for what, value in rows(plan):
        table.add_row(what, value)
    table.add_section()
    table.add_row(", ".join(OTHERS), UNMEASURED)
    return table


def rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """The rows of the table."""
    costs = plan.costs
    for route, number in costs.matrices.items():
        yield f"matrices x sources, by {route}", str(number)
    if costs.summed:
        yield "  only Gram matrices sent, busiest device", str(costs.summed)
    yield "flops of a sample, all devices", count(costs.total_flops)
    yield "  on the busiest device", count(costs.flops.total())
    yield "  in training steps, by flops", UNMEASURED if plan.in_steps is None else f"{plan.in_steps:.3g}"
    if plan.num_devices > 1:
        yield "largest number of bytes that a device sends", size(max(costs.sent))
        yield "largest number of bytes that a device receives", size(max(costs.received))
        yield "collectives, and bytes that they add up", f"{costs.collectives}, {size(costs.pooled)}"
    yield "memory held from before a step until after it", size(costs.kept)
    yield "  at the peak of a sample", size(costs.peak)
    yield "  largest matrix", size(costs.largest)
    where = f"{plan.device} ({devices()[plan.device].what})" if plan.device in devices() else plan.device
    yield f"ms of a sample: {where}", time(plan.sample_ms)
    yield "ms of a training step", time(plan.step_ms)
    yield f"training takes longer, a sample every {plan.every_n_steps} steps", _share(plan)


def _share(plan: Plan) -> str:
    """What watching takes, or what is lacking to know it."""
    if plan.share is not None:
        return f"{plan.share:.2g} %"
    if plan.num_devices > 1:
        return f"{UNMEASURED}: so are exchanges between devices"
    return UNMEASURED if plan.sample_ms is None else f"{UNMEASURED}: give --step-ms or --tokens-per-step"


def plain(plan: Plan) -> dict[str, Any]:
    """For a program: null where nothing was measured."""
    costs = {field.name: getattr(plan.costs, field.name) for field in fields(plan.costs)}
    costs = {key: value for key, value in costs.items() if key not in ("flops", "size", "rank")}
    by_route: dict[str, float] = {}
    for (route, _), flops in plan.costs.flops.items():
        by_route[route] = by_route.get(route, 0.0) + flops
    said = {key: getattr(plan, key) for key in (field.name for field in fields(plan)) if key != "costs"}
    derived = {"in_steps": plan.in_steps, "share_percent": plan.share, "flops": by_route}
    return said | derived | costs | {"unmeasured": OTHERS}


def count(number: int | float) -> str:
    """With three digits and a letter."""
    for exponent, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**exponent:
            return f"{number / 10**exponent:.3g} {letter}"
    return f"{number:.3g}"


def size(number: int | float) -> str:
    """Bytes with three digits and a unit."""
    for exponent, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**exponent:
            return f"{number / 2**exponent:.3g} {unit}"
    return f"{number:.0f} B"


def time(milliseconds: float | None) -> str:
    """Or that nobody measured it."""
    return UNMEASURED if milliseconds is None else f"{milliseconds:.3g}"
