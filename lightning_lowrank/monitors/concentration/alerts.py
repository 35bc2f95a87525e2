"""The rule on masks that have settled."""

from typing import Any

from lightning_lowrank.reports.alerts.rules import EVENT, Alert


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

    Examples:
        >>> EarlyBirdAlert().quantity
        'concentration_mask_early_bird_0.5'
    """
    cause = "the ticket has emerged: pruned to this mask now, training would keep nearly the same weights"
    told = {**EVENT, "below": below, "actions": ("warn", "log", "wandb"), "cause": cause, **options}
    return Alert(f"concentration_mask_early_bird_{density:g}", **told)
