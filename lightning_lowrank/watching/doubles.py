"""Two monitors of one training that would write the same."""

from lightning_lowrank.watching.watch import Watch


def refuse_double(one: Watch, other: Watch) -> None:
    """Refuse a second monitor that would write the same tags.

    Raises:
        ValueError: With what both would write.
    """
    both = _words(one) & _words(other)
    if both:
        names = f"monitors {one.label!r} and {other.label!r}"
        raise ValueError(f"{names} would both write {sorted(both)}; give one of them name='...'")
    if one.budget is not None and one.budget is other.budget:
        raise ValueError(f"monitors {one.label!r} and {other.label!r} share one Budget object; give each its own")


def _words(watch: Watch) -> set[str]:
    """What stands in the tags that only this monitor may write."""
    return {watch.label, *watch.quantities, *(state.name for state in watch.journal.alerts.states)}
