"""Messages of alerts: what happened and where, the value and its threshold, since when, the cause, and a link."""

import math
from collections.abc import Sequence

from lightning_lowrank.measuring.number_source import WHOLE_MODEL
from lightning_lowrank.reports.alerts.rules import Alert, AlertEvent, SiteAlert
from lightning_lowrank.tensorboard.site import page

PAGE = page("how-to/get-alerts")
# Stands for the share of sites without a number. No tag may have brackets.
SHARE = "(share of sites without a number)"
# Sites that a message names.
NAMED = 5

# By the word in the quantity's name; the first that is in it.
CAUSES = {
    "second_moment": "an optimizer state that was reset or overflowed",
    "first_moment": "gradients that all have the same direction: a learning rate that is too high, or repeated batches",
    "displacement": (
        "weights that move along few directions: a learning rate that is too high, or a loss dominated by few examples"
    ),
    "feature": (
        "outputs that no longer distinguish inputs: a self-supervised loss without stop-gradient or with too "
        "little variance, dead units, or a missing normalisation"
    ),
    "gradient": (
        "one dominant direction of the batch, a layer without a gradient, or, at 0, dead units or a saturated loss"
    ),
    "update": "a learning rate that is too high, momentum on few directions, or clipping at every step",
    "weight": (
        "a learning rate that is too high for this depth, or a missing normalisation, so that one direction "
        "outgrows all others"
    ),
}
NO_NUMBER = (
    "a NaN or infinite loss: a learning rate that is too high, an overflow in half precision, or a division by zero. "
    "If an earlier warning says that decompositions failed, that is the cause"
)


def title_of(event: AlertEvent) -> str:
    """At most 63 characters, which is what wandb takes."""
    return f"{event.rule}: {event.state} at step {event.step}"[:63]


def message_of(event: AlertEvent, rule: Alert) -> str:
    """The whole story of an alert that fires, on one line."""
    named = "; ".join(_of_site(site) for site in event.worst)
    more = event.num_firing - len(event.worst)
    first = event.worst[0]
    where = f"{event.num_firing} of {event.num_sites} sites"
    if first.condition == "non_finite":
        where = "the monitor"
    elif first.site == WHOLE_MODEL:
        where = "the whole model"
    also = f"; and {more} more" if more else ""
    cause = rule.cause or _usual(event)
    because = f" Usual cause: {cause}." if cause else ""
    return (
        f"rule {event.rule}, {event.quantity} at {where} since step {event.since}: "
        f"{named}{also}.{because} See {PAGE}#when-one-fires."
    )


def recovery_of(event: AlertEvent, sites: Sequence[str], reported: int) -> str:
    """What is over, on one line.

    Args:
        event: It.
        sites: All that were in a message.
        reported: Step of the first message.
    """
    places = [site for site in sites if site not in (WHOLE_MODEL, SHARE)]
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    where = f" of {', '.join(places[:NAMED])}{more}" if places else ""
    return (
        f"rule {event.rule}, {event.quantity}{where} has recovered at step {event.step}; it was unhealthy since step "
        f"{event.since}, and reported at step {reported}."
    )


def table(events: Sequence[AlertEvent]) -> str:
    """All events so far as a table in Markdown."""
    rows = [f"| {event.step} | {event.rule} | {event.state} | {event.message.replace('|', '/')} |" for event in events]
    return "\n".join(["| step | rule | state | message |", "|---|---|---|---|", *rows])


def _of_site(site: SiteAlert) -> str:
    """A site's number against what it should be."""
    value = f"{site.site} {site.value:.4g}".lstrip() + (f" +- {site.error:.2g}" if site.error else "")
    against = "" if math.isnan(site.baseline) else f", baseline {site.baseline:.4g}{_percent(site)}"
    match site.condition:
        case "slope":
            return f"{value}, falls by more than {-site.threshold:.3g} of its mean per sample"
        case "non_finite":
            return f"{value}, allowed {site.threshold:.3g}"
        case "change":
            return f"{value}, another level{against}, allowed to {site.threshold:.4g}"
        case "departure":
            return f"{value}, unlike before in this run{against}, allowed to {site.threshold:.4g}"
        case "cusum":
            return f"{value}, drifts upwards{against}, in total by more than {site.threshold:.3g} spreads"
    upper = site.condition in ("above", "rise", "spike")
    return f"{value}{against}, alert {'above' if upper else 'below'} {site.threshold:.4g}"


def _percent(site: SiteAlert) -> str:
    return f" ({100 * (site.value / site.baseline - 1):+.0f} %)" if site.baseline else ""


def _usual(event: AlertEvent) -> str:
    if event.worst[0].condition == "non_finite":
        return NO_NUMBER
    return next((cause for word, cause in CAUSES.items() if word in event.quantity), "")
