"""Rules on the anatomy of gradients."""

from collections.abc import Sequence
from typing import Any

from lightning_lowrank.reports.alerts.rules import EVENT, Alert


def NotLowRankAlert(below: float = 0.5, sites: str | Sequence[str] = "*", **options: Any) -> Alert:
    """An alert for a gradient that is not low-rank: too little of its energy is in the top directions, of which there
    is one more than the model has outputs.

    Args:
        below: Smallest share of the energy that does not fire.
        sites: As in `Alert`, like all that follows.
        options: Other options of `Alert`.

    Examples:
        >>> NotLowRankAlert().quantity
        'anatomy_low_rank_share'
    """
    cause = "strong weight decay or noise in the loss, a loss near its minimum, or inputs without a common direction"
    return Alert("anatomy_low_rank_share", sites, **{"below": below, "warm_up_samples": 0, "cause": cause, **options})


def ResidueSuppressedAlert(above: float = 0.6, sites: str | Sequence[str] = "*", **options: Any) -> Alert:
    """An alert for a gradient in which the spike of the inputs replaces the residue.

    Args:
        above: Largest share of the spike in the energy of both that does not fire.
        sites: As in `Alert`, like all that follows.
        options: Other options of `Alert`.

    Examples:
        >>> ResidueSuppressedAlert(sites="net.0.*").sites
        'net.0.*'
    """
    cause = (
        "an activation with a kink (ReLU) on inputs with a strong common direction; standardise the inputs, add "
        "noise, or use a smooth activation"
    )
    return Alert("anatomy_spike_dominance", sites, **{"above": above, "warm_up_samples": 0, "cause": cause, **options})


def PhaseShiftAlert(sites: str | Sequence[str] = "*", **options: Any) -> Alert:
    """An event, not a warning: the spike of the inputs dominates a gradient that the residue dominated before.

    Args:
        sites: As in `Alert`, like all that follows.
        options: Other options of `Alert`.

    Examples:
        >>> PhaseShiftAlert().severity
        'info'
    """
    cause = (
        "the network has learnt the part of the residue in the bulk of the inputs, so only their common "
        "direction is left"
    )
    return Alert(
        "anatomy_phase_shift", sites, **{**EVENT, "above": 0.5, "actions": ("log", "wandb"), "cause": cause, **options}
    )
