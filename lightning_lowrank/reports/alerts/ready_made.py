"""Rules that are ready to use: rank collapse, change points, and what every preset watches for."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from lightning_lowrank.reports.alerts.rules import Action, Alert, AlertEvent, Baseline

Source = Literal[
    "weight",
    "gradient",
    "update",
    "displacement",
    "first_moment",
    "second_moment",
    "feature",
    "centred_feature",
    "validation_feature",
]

# Share of the baseline that may be lost. Gradients lose most of their rank in health, and updates of Adam follow them;
# weights do not.
ALLOWED_DROP = {"weight": 0.5, "feature": 0.7, "centred_feature": 0.7, "validation_feature": 0.7}
LARGEST_DROP = 0.9

# Of the defaults: in health weights lose up to four fifths of their stable rank, most of it at first.
PATIENT: dict[str, Any] = {"warm_up_samples": 20, "warm_up_steps": 500}

# Of rules that tell of an event as soon as it is seen, whatever it is.
EVENT: dict[str, Any] = {"severity": "info", "for_samples": 1, "warm_up_samples": 0}

# What is said where curvature is not believed: all of it is NaN then.
WRONG = (
    "a layer whose backward pass cannot be differentiated, as custom autograd functions that "
    "detach; name the others by match"
)


def RankCollapseAlert(
    source: Source = "weight",
    statistic: str = "stable_rank",
    sites: str | Sequence[str] = "*",
    floor: float | None = None,
    drop: float | None = None,
    baseline: Baseline = "running",
    for_samples: int = 3,
    quorum: int | float = 1,
    cooldown_steps: int = 500,
    warm_up_samples: int = 10,
    warm_up_steps: int = 0,
    actions: Sequence[Action] = ("warn", "log", "wandb"),
    call: Callable[[AlertEvent], Any] | None = None,
    name: str | None = None,
) -> Alert:
    """An alert for a rank that falls far below what it was, or below a floor.

    Args:
        source: Whose rank.
        statistic: Which rank.
        sites: As in `Alert`, like all that follows except for these:
        floor: Least rank allowed; 0.5 is what a zero matrix, whose rank is 0, falls below, and no other.
        drop: Share of the baseline that may be lost. If there is no floor either, it depends on the source: 0.5 for
            weights, 0.7 for features, 0.9 for gradients, updates and what they add up to, since low rank is normal
            there. Updates of optimizers that orthogonalise (Muon) are flat by construction: for those give 0.3.

    Example:
        >>> RankCollapseAlert("gradient", floor=0.5, drop=0.95, actions=["warn", "stop"]).conditions
        ['below', 'drop']
    """
    if floor is None and drop is None:
        drop = ALLOWED_DROP.get(source, LARGEST_DROP)
    return Alert(
        f"{source}_{statistic}",
        sites,
        below=floor,
        drop=drop,
        baseline=baseline,
        for_samples=for_samples,
        quorum=quorum,
        cooldown_steps=cooldown_steps,
        warm_up_samples=warm_up_samples,
        warm_up_steps=warm_up_steps,
        actions=actions,
        call=call,
        name=name,
    )


def ChangePointAlert(
    quantity: str,
    sites: str | Sequence[str] = "*",
    change: float = 4.0,
    window: int = 20,
    baseline: Baseline = "warm-up",
    for_samples: int = 3,
    quorum: int | float = 1,
    cooldown_steps: int = 0,
    warm_up_steps: int = 0,
    actions: Sequence[Action] = ("warn", "log", "wandb"),
    call: Callable[[AlertEvent], Any] | None = None,
    name: str | None = None,
) -> Alert:
    """An alert for a quantity that leaves its level for another, up or down: a phase transition such as grokking.

    Args:
        quantity: As in `Alert`, like all others.
        change: Spreads of the level, of which each is at least 2 % of it.
        window: Samples that a level is learnt from.
        baseline: "warm-up": a level is kept until it is left, however slowly, so that a steady trend is told too once
            it has come far enough. "running": the level follows what is slower than `window`, and only jumps are told.

    Example:
        >>> ChangePointAlert("weight_effective_rank", "blocks.*").conditions
        ['change']
    """
    return Alert(
        quantity,
        sites,
        change=change,
        window=window,
        baseline=baseline,
        for_samples=for_samples,
        quorum=quorum,
        cooldown_steps=cooldown_steps,
        warm_up_samples=window,
        warm_up_steps=warm_up_steps,
        severity="info",
        actions=actions,
        call=call,
        cause="a phase transition (grokking, a new circuit), or a jump of the learning rate",
        name=name,
    )


def NotLowRankAlert(below: float = 0.5, sites: str | Sequence[str] = "*", **options: Any) -> Alert:
    """An alert for a gradient that is not low-rank: too little energy in as many directions as the model has outputs,
    and one more.

    Args:
        below: Least share of the energy.
        sites: As in `Alert`, like all that follows.
        options: Others of `Alert`.

    Example:
        >>> NotLowRankAlert().quantity
        'anatomy_low_rank_share'
    """
    cause = "strong weight decay or noise in the loss, a loss near its minimum, inputs without a common direction"
    return Alert("anatomy_low_rank_share", sites, **_with(options, below=below, warm_up_samples=0, cause=cause))


def ResidueSuppressedAlert(above: float = 0.6, sites: str | Sequence[str] = "*", **options: Any) -> Alert:
    """An alert for a gradient in which the spike of the inputs takes the place of the residue.

    Args:
        above: Largest share of the spike in what both have.
        sites: As in `Alert`, like all that follows.
        options: Others of `Alert`.

    Example:
        >>> ResidueSuppressedAlert(sites="net.0.*").sites
        'net.0.*'
    """
    cause = (
        "an activation with a kink (ReLU) on inputs with a strong common direction: standardise "
        "them, add noise, or take a smooth one"
    )
    return Alert("anatomy_spike_dominance", sites, **_with(options, above=above, warm_up_samples=0, cause=cause))


def PhaseShiftAlert(sites: str | Sequence[str] = "*", **options: Any) -> Alert:
    """An event, not a warning: a gradient that the residue ruled is ruled by the spike of the inputs now.

    Args:
        sites: As in `Alert`, like all that follows.
        options: Others of `Alert`.

    Example:
        >>> PhaseShiftAlert().severity
        'info'
    """
    cause = "what the residue had in the bulk of the inputs is learnt, so that their common direction is left"
    return Alert(
        "anatomy_phase_shift", sites, **_with(EVENT | options, above=0.5, actions=("log", "wandb"), cause=cause)
    )


def EarlyBirdAlert(density: float = 0.5, below: float = 0.2, **options: Any) -> Alert:
    """An event for the moment at which the mask of the largest weights has settled: the early-bird ticket of You et al.
    (2020).

    Args:
        density: Of the mask; one of those that the monitor has.
        below: Largest distance of the newest mask to those of the second half of the training so far, over its distance
            to the first. A mask that moves steadily has 0.5 or a bit more at any cadence, one that has settled 0. You
            et al. ask for a tenth of the weights between five epochs; masks of a few steps in a row are closer than
            that from the first on.
        options: Others of `Alert`.

    Example:
        >>> EarlyBirdAlert().quantity
        'concentration_mask_early_bird_0.5'
    """
    cause = "the ticket has emerged: pruned to this mask now, training would keep nearly the same weights"
    told = _with(EVENT | options, below=below, actions=("warn", "log", "wandb"), cause=cause)
    return Alert(f"concentration_mask_early_bird_{density:g}", **told)


def _with(options: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    return defaults | options


def default_alerts(quantities: Iterable[str]) -> list[Alert]:
    """What every preset watches for, as far as it measures it: quiet in health."""
    known = list(quantities)
    first_of_gradient = next((q for q in known if q.startswith("gradient_") and q != "gradient_in_top"), None)
    rules = [
        RankCollapseAlert("weight", "stable_rank", drop=0.35, **PATIENT),
        RankCollapseAlert("weight", "effective_rank", drop=0.06, **PATIENT),
        RankCollapseAlert("gradient", "stable_rank", floor=0.5),
        RankCollapseAlert("feature", "participation_ratio", drop=0.5, **PATIENT),
        # There is a sample for each validation, not for some steps: twenty would be too long.
        RankCollapseAlert("validation_feature", "participation_ratio", drop=0.5, warm_up_steps=500),
        Alert("curvature_valid", below=0.5, for_samples=1, warm_up_samples=0, cause=WRONG),
        PhaseShiftAlert(),
    ]
    lost = [Alert(first_of_gradient, non_finite=0.5)] if first_of_gradient else []
    return [rule for rule in rules if rule.quantity in known] + lost
