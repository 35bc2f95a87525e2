"""The rule on masks that have settled."""

from typing import Any

from lightning_lowrank.reports.alerts.rules import EVENT, Alert


def EarlyBirdAlert(density: float = 0.5, below: float = 0.2, **options: Any) -> Alert:
    """An event when the mask of the largest weights has settled: the early-bird ticket of You et al. (2020).

    Args:
        density: Density of the mask; one of the monitor's `densities`.
        below: Largest distance of the newest mask to those of the second half of the training so far, over its distance
            to the first. A mask that moves steadily has 0.5 or slightly more at any cadence, and a settled one has 0.
            You et al. require a distance below a tenth of the weights between five epochs; masks of consecutive steps
            are closer than that from the start.
        options: Other options of `Alert`.

    Examples:
        >>> EarlyBirdAlert().quantity
        'concentration_mask_early_bird_0.5'
    """
    cause = "the mask has settled: pruning now would keep nearly the same weights as pruning later"
    told = {**EVENT, "below": below, "actions": ("warn", "log", "wandb"), "cause": cause, **options}
    return Alert(f"concentration_mask_early_bird_{density:g}", **told)
