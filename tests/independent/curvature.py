"""Curvature from dense Hessians and Gauss-Newton matrices, the edge of stability from the optimizers' own formulas, and
critical sharpness from a search along the update.
"""

from functools import cache

import numpy as np
import torch
from scipy.optimize import brentq

from tests.independent.dense import Dense
from tests.independent.multifractal import Drawn
from tests.independent.ranks import Found
from tests.independent.trainings import CASES, SPARSE, Run, Step, run

TOP, DRAWS = 3, 24
SAMPLES = (0, SPARSE)
Sums = dict[str, float]


@cache
def dense(name: str, i: int) -> Dense:
    """Of a step's own loss, before the step."""
    watched = run(name)
    return Dense.of(watched, watched.steps[i].before, watched.steps[i].batch, watched.parameters())


def expected(run: Run) -> Found:
    """All quantities of `CurvatureMonitor`."""
    found: Found = {}
    before: dict[str, np.ndarray] = {}
    for i in SAMPLES:
        here = dense(run.name, i)
        numbers, sites = _of_loss(here, run.case.level == "full")
        tops = {name: _top(matrix) for name, matrix in _matrices(here).items()}
        for name, top in tops.items():
            last = before.get(name)
            overlap = np.nan if last is None else ((last.T @ top) ** 2).sum() / TOP
            numbers[f"{name}_eigenspace_overlap"] = overlap
            sites[f"{name}_top_share"] = _by_parameter(here, (top**2).mean(1))
        numbers |= _moved(run, here, i, before.get("hessian")) | _edge(run, here, i) | _critical(run, i)
        numbers |= {"curvature_valid": 1.0, "curvature_symmetry_defect": 0.0 if i == 0 else np.nan}
        numbers["curvature_difference_defect"] = 0.0 if i == 0 else np.nan
        _note(found, i, numbers, sites)
        before = tops
    return found


def light(run: Run) -> Found:
    """Those of the level "light"."""
    found: Found = {}
    for i in SAMPLES:
        here = dense(run.name, i)
        numbers = {name: value for name, value in _edge(run, here, i).items() if name.startswith("batch")}
        numbers |= {"curvature_valid": 1.0, "curvature_symmetry_defect": 0.0 if i == 0 else np.nan}
        numbers["curvature_difference_defect"] = 0.0 if i == 0 else np.nan
        _note(found, i, {f"light_{name}": value for name, value in numbers.items()}, {})
    return found


def _note(found: Found, i: int, numbers: Sums, sites: dict[str, Sums]) -> None:
    for name, value in numbers.items():
        found.setdefault(name, {}).setdefault("", {})[i] = value
    for name, row in sites.items():
        for site, value in row.items():
            found.setdefault(name, {}).setdefault(site, {})[i] = value


def _matrices(here: Dense) -> dict[str, np.ndarray]:
    fisher = here.fisher(here.labels)
    return {"hessian": here.hessian, "gauss_newton": here.gauss_newton, "empirical_fisher": fisher}


def _of_loss(here: Dense, full: bool) -> tuple[Sums, dict[str, Sums]]:
    numbers: Sums = {}
    sites: dict[str, Sums] = {}
    for name, matrix in _matrices(here).items():
        numbers |= {f"{name}_{label}": value for label, value in _of_matrix(matrix, full).items()}
        if name == "hessian" and not full:
            del numbers["hessian_participation_ratio"]
        sites[f"{name}_layer_trace"] = _by_parameter(here, np.diag(matrix))
        sites[f"{name}_layer_squared_norm"] = _by_parameter(here, (matrix**2).sum(1))
    rest = here.hessian - here.gauss_newton
    numbers |= {"residual_trace": float(np.trace(rest)), "residual_squared_norm": float((rest**2).sum())}
    return numbers | _monte_carlo(here, full, sites), sites


def _monte_carlo(here: Dense, full: bool, sites: dict[str, Sums]) -> Sums:
    """What draws of our own give, and how far they are from each other."""
    random = np.random.default_rng(0)
    drawn = [here.fisher(_targets(here, random)) for _ in range(DRAWS)]
    rows = [_of_matrix(matrix, full) for matrix in drawn]
    tops = [_by_parameter(here, (_top(matrix) ** 2).mean(1)) for matrix in drawn]
    traces = [_by_parameter(here, np.diag(matrix)) for matrix in drawn]
    squares = [_by_parameter(here, (matrix**2).sum(1)) for matrix in drawn]
    for label, of_draws in (("top_share", tops), ("layer_trace", traces), ("layer_squared_norm", squares)):
        sites[f"monte_carlo_fisher_{label}"] = _spread(of_draws)
    return {f"monte_carlo_fisher_{name}": value for name, value in _spread(rows).items()}


def _targets(here: Dense, random: np.random.Generator) -> np.ndarray:
    places = [random.choice(here.chances.shape[1], p=row / row.sum()) for row in here.chances]
    return np.eye(here.chances.shape[1])[places]


def _spread(rows: list[Sums]) -> Sums:
    return {name: Drawn.of([row[name] for row in rows]) for name in rows[0]}


def _of_matrix(matrix: np.ndarray, full: bool) -> Sums:
    values = np.linalg.eigvalsh(matrix)[::-1]
    sizes = np.sort(np.abs(values))[::-1]
    shares = sizes / sizes.sum()
    found = {"lambda_max": values[0], **{f"lambda_{i}": values[i - 1] for i in range(2, TOP + 1)}}
    found |= {"trace": values.sum(), "squared_norm": (values**2).sum()}
    found["participation_ratio"] = sizes.sum() ** 2 / (sizes**2).sum()
    if full:
        some = shares[shares > 1e-300]
        found |= {"lambda_min": values[-1], "effective_rank_energy": np.exp(-(some * np.log(some)).sum())}
        found["energy_rank"] = 1 + int((shares.cumsum() < 0.9 * (1 - 1e-12)).sum())
        found["negative_mass"] = -values[values < 0].sum() / sizes.sum()
    return {name: float(value) for name, value in found.items()}


def _top(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.eigh(matrix)[1][:, ::-1][:, :TOP]


def _by_parameter(here: Dense, entries: np.ndarray) -> Sums:
    parts = np.split(entries, np.cumsum(here.sizes)[:-1])
    return {name: float(part.sum()) for name, part in zip(here.names, parts, strict=True)}


def _flat(here: Dense, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return here.flat([tensors[name].double() for name in here.names])


def _moved(run: Run, here: Dense, i: int, top: np.ndarray | None) -> Sums:
    """Parts of gradient, update and the way so far within the directions of the last sample."""
    step, start = run.steps[i], run.steps[0]
    before = _flat(here, step.before)
    moves = {"gradient": _flat(here, step.gradients), "update": _flat(here, step.after) - before}
    moves["displacement"] = before - _flat(here, start.before)
    if top is None:
        return dict.fromkeys([*(f"{name}_in_top" for name in moves), "in_top_chance"], np.nan)
    found = {f"{name}_in_top": float(((top.T @ move) ** 2).sum() / (move @ move)) for name, move in moves.items()}
    return found | {"in_top_chance": TOP / len(before)}


def _edge(run: Run, here: Dense, i: int) -> Sums:
    """Along the gradient, and where the optimizer of the case would become unstable."""
    g = here.gradient
    along = float(g @ here.hessian @ g / (g @ g))
    limit, diagonal = _limit(run, here, run.steps[i - 1] if i else None, i)
    found = {"batch_sharpness": along, "sharpness_over_threshold": np.nan}
    if limit is not None and diagonal is None:
        found["batch_sharpness_over_threshold"] = along / limit
    if limit is not None:
        root = np.ones(len(g)) if diagonal is None else diagonal**-0.5
        scaled = root[:, None] * here.hessian * root
        found["sharpness_over_threshold"] = float(np.linalg.eigvalsh(scaled)[-1]) / limit
    return found


def _limit(run: Run, here: Dense, last: Step | None, steps: int) -> tuple[float | None, np.ndarray | None]:
    """The largest stable eigenvalue of `P^-1 H`, and P of Adam after so many steps."""
    optimizer = CASES[run.name].optimizer([torch.nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    if "betas" not in group:
        return 2 * (1 + group["momentum"]) / group["lr"], None
    if last is None:
        return None, None
    first, second = group["betas"]
    squares = _flat(here, {name: state["exp_avg_sq"] for name, state in last.moments.items()})
    denominator = (1 - first**steps) * (np.sqrt(squares / (1 - second**steps)) + group["eps"])
    shrinkage = group["lr"] * group["weight_decay"] * isinstance(optimizer, torch.optim.AdamW)
    return (2 - shrinkage) * (1 + first) / (group["lr"] * (1 - first)), denominator


def _critical(run: Run, i: int) -> Sums:
    """The first multiple of the update at which the loss is what it was before it, on the batch of the step."""
    step = run.steps[i]
    module = run.at(step.after, torch.float64)
    batch = [part.double() if part.is_floating_point() else part for part in step.batch]
    named = {name: parameter for name, parameter in module.named_parameters() if name in run.parameters()}

    @torch.no_grad()
    def loss(multiple: float) -> float:
        for name, parameter in named.items():
            before, after = (values[name].double() for values in (step.before, step.after))
            parameter.copy_(before + multiple * (after - before))
        return float(module.loss(batch))

    start = loss(0.0)
    excess = lambda multiple: loss(multiple) - start  # noqa: E731
    grid = np.geomspace(0.02, 5e4, 400)
    values = np.array([excess(multiple) for multiple in grid])
    rises = np.nonzero((values[:-1] <= 0) & (values[1:] > 0))[0]
    if not len(rises):
        return {"critical_multiple": np.nan, "critical_sharpness": np.nan}
    multiple = float(brentq(excess, grid[rises[0]], grid[rises[0] + 1]))
    rate = CASES[run.name].optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
    return {"critical_multiple": multiple, "critical_sharpness": 2 / (rate * multiple)}
