"""Rules that are ready to use: rank collapse, change points, departures, and what monitors have by default."""

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
# What is never healthy is compared with nothing, so there is nothing to learn first: `for_samples` is all its patience.
AT_ONCE: dict[str, Any] = {"warm_up_samples": 0}
INACTIVE = "a learning rate that is too high, a large negative bias, or inputs that are not normalised"
NO_GRADIENT = (
    "a layer that the loss does not reach: dead units after it or before it, an expert without tokens, or detach()"
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
    """An alert for a rank that falls far below its earlier value, or below a floor.

    Args:
        source: Source of the matrices.
        statistic: The kind of rank.
        sites: As in `Alert`, like all that follows except `floor` and `drop`.
        floor: Smallest allowed rank. Only a zero matrix, whose rank is 0, is below 0.5.
        drop: Allowed decrease, as a share of the baseline. If there is no floor either, it depends on the source: 0.5
            for weights, 0.7 for features. It is 0.9 for gradients, updates and their sums, since low rank is normal
            there. Updates of optimizers that orthogonalise (Muon) are flat by construction; use 0.3 for them.

    Examples:
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
    """An alert for a quantity that moves to another level, up or down: a phase transition such as grokking.

    Args:
        quantity: As in `Alert`, like all others.
        change: Allowed distance from the level in spreads; a spread is at least 2 % of the level.
        window: Number of samples from which a level is learnt.
        baseline: "warm-up": a level stays until it is left, however slowly, so a steady trend is reported, too, once it
            is large enough. "running": the level follows changes that are slower than `window`, so only jumps are
            reported.

    Examples:
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


def DepartureAlert(quantity: str, sites: str | Sequence[str] = "*", departure: float = 12.0, **options: Any) -> Alert:
    """An alert for a quantity that leaves its own earlier distribution in this run, up or down.

    False alarms in 1,000 samples of healthy trainings, as means over 85 quantities of sites and 105 of whole models
    (docs/evidence/warnings.md). At 6 spreads: 4.0 at any site, 0.5 at half of the sites, 1.0 of the whole model. At 12
    spreads: 1.4, 0.2 and 0.7. At 24 spreads: 0.7, 0.1 and 0.6. Most quantities have none; a few have most of them.

    Args:
        quantity: As in `Alert`, like all others.
        sites: Globs of the sites to watch.
        departure: Allowed distance from the median of the run's earlier samples, in spreads.
        options: Other options of `Alert`. The baseline is "healthy", learnt from at least 20 and at most 100 samples.

    Examples:
        >>> DepartureAlert("update_effective_rank", quorum=0.5).baseline
        'healthy'
    """
    usual = {"baseline": "healthy", "window": 100, "warm_up_samples": 20}
    return Alert(quantity, sites, departure=departure, **{**usual, **options})


def SpikeAlert(quantity: str, sites: str | Sequence[str] = "*", spike: float = 6.0, **options: Any) -> Alert:
    """An alert for a single number far above those before it: the spike score.

    Args:
        quantity: As in `Alert`, like all others.
        sites: Globs of the sites to watch.
        spike: Allowed distance above the mean of the last samples, in standard deviations.
        options: Other options of `Alert`. A window has 128 samples; samples that are not spikes enter the next window.

    Examples:
        >>> SpikeAlert("noise_gradient_energy").window
        128
    """
    return Alert(quantity, sites, spike=spike, **{"window": 128, "warm_up_samples": 128, "for_samples": 1, **options})


def CusumAlert(quantity: str, sites: str | Sequence[str] = "*", cusum: float = 8.0, **options: Any) -> Alert:
    """An alert for a quantity that is slightly above its baseline for a long time: an upward CUSUM.

    Args:
        quantity: As in `Alert`, like all others.
        sites: Globs of the sites to watch.
        cusum: Allowed sum of excesses over the baseline in spreads, each reduced by half a spread.
        options: Other options of `Alert`. The baseline consists of the last 128 samples without a violation.

    Examples:
        >>> CusumAlert("noise_gradient_energy").conditions
        ['cusum']
    """
    return Alert(quantity, sites, cusum=cusum, **{"window": 128, "warm_up_samples": 128, "for_samples": 1, **options})


def default_alerts(quantities: Iterable[str]) -> list[Alert]:
    """The default rules for the measured quantities: they warn of faults and are quiet in healthy trainings.

    The second half was chosen on one seed of many trainings and reported on three others: docs/evidence/warnings.md.
    """
    known = list(quantities)
    first_of_gradient = next((quantity for quantity in known if quantity.startswith("gradient_")), None)
    rules = [
        RankCollapseAlert("weight", "stable_rank", drop=0.35, **PATIENT),
        RankCollapseAlert("weight", "effective_rank", drop=0.06, **PATIENT),
        Alert("gradient_stable_rank", below=0.5, cause=NO_GRADIENT, **AT_ONCE),
        RankCollapseAlert("feature", "participation_ratio", drop=0.5, **PATIENT),
        # There is a sample for each validation, not for some steps: twenty would be too long.
        RankCollapseAlert("validation_feature", "participation_ratio", drop=0.5, warm_up_steps=500),
        Alert("dormant_inactive", above=0.9, cause=INACTIVE, **AT_ONCE),
        *(DepartureAlert(f"{source}_spectral_norm") for source in ("gradient", "update", "feature")),
        DepartureAlert("activation_rms"),
        CusumAlert("activation_kurtosis", window=20, warm_up_samples=20),
        DepartureAlert("attention_max_logit", quorum=0.5),
        DepartureAlert("dormant_share", departure=24.0),
        SpikeAlert("step_loss", spike=16.0),
        CusumAlert("step_loss"),
    ]
    lost = [Alert(first_of_gradient, non_finite=0.5, **AT_ONCE)] if first_of_gradient else []
    return [rule for rule in rules if rule.quantity in known] + lost
