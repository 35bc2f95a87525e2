"""All rules of a monitor: shown every report, they act when the batch is over."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any, Literal

from lightning_lowrank.models.training import Training
from lightning_lowrank.reports.alerts import actions
from lightning_lowrank.reports.alerts.rules import Alert, AlertError, AlertEvent, SiteAlert
from lightning_lowrank.reports.alerts.states import RuleState
from lightning_lowrank.reports.announcing import of_number

# Events that are kept for the table and the file: what is older was told long ago.
KEPT = 1000

Rules = Sequence[Alert] | Literal["default"] | None
# What "default" stands for, by the quantities that there are.
Usual = Callable[[Sequence[str]], Sequence[Alert]]
Values = Mapping[str, Mapping[str, float]]


class Rulebook:
    """The rules of one monitor and what they have told. Every process has the same numbers, so that all decide alike.

    Args:
        rules: Those of the user, or "default", or None.
        quantities: What the monitor measures.
        usual: What "default" stands for: rules by the quantities that there are, without prefix.
        prefix: Of the monitor's quantities; rules may leave it out.
        label: Word for the monitor in messages and tags.

    Attributes:
        events: What was told in this run.

    Raises:
        ValueError: A rule is on a quantity that is not measured, or two have one name.
    """

    def __init__(
        self,
        rules: Rules,
        quantities: Sequence[str],
        *,
        usual: Usual,
        prefix: str | None,
        label: str,
    ) -> None:
        if isinstance(rules, str) and rules != "default":
            raise ValueError(f"alerts={rules!r} must be a list of alerts, 'default' or None")
        if isinstance(rules, Alert) or any(
            not isinstance(rule, Alert) for rule in rules or () if not isinstance(rules, str)
        ):
            raise ValueError(
                f"alerts={rules!r} must be a list of Alert(...), even for a single one; plain dictionaries work "
                "only in YAML"
            )
        start = f"{prefix}_" if prefix else ""
        measured = [quantity.removeprefix(start) for quantity in quantities]
        usually = [rule for rule in usual(measured) if rule.quantity in measured]
        given = usually if isinstance(rules, str) else rules or ()
        self.states = [_state(rule, quantities, start) for rule in given]
        names = [state.name for state in self.states]
        if len(set(names)) < len(names):
            raise ValueError(f"alerts must have different names, not {names}")
        self.label = label
        self.events: list[AlertEvent] = []
        self.calls = actions.Calls()
        self._due: list[tuple[Alert, AlertEvent]] = []
        self._raising: AlertEvent | None = None

    def begin(self) -> None:
        """Another run, that is no continuation."""
        self.events, self._due, self._raising = [], [], None
        for state in self.states:
            state.begin()

    def check_actions(self, training: Training) -> None:
        """Refuse rules that ask for what nobody does.

        Raises:
            ValueError: A rule asks for a checkpoint that nobody can write.
        """
        for state in self.states:
            if "checkpoint" in state.rule.actions and not training.may_save:
                raise ValueError(
                    f"alert {state.name!r} requests a checkpoint; give watching(..., save_checkpoint=...) a "
                    "function that writes one to a path"
                )

    def check(self, sites: Mapping[str, Sequence[str]]) -> None:
        """Refuse rules that look at nothing.

        Args:
            sites: Of each quantity, as far as they are known before training.

        Raises:
            ValueError: The patterns of a rule fit no site; the message has some of what there is.
        """
        for state in self.states:
            known = list(sites.get(state.quantity, ()))
            if known and not any(map(state.matches, known)):
                more = f" and {len(known) - 10} more" if len(known) > 10 else ""
                there = f"has {known[:10]}{more}" if any(known) else "is one number of the whole model; remove sites="
                raise ValueError(
                    f"alert {state.name!r}: sites={state.rule.sites!r} matches nothing; {state.quantity} {there}"
                )
            looked_at = sum(map(state.matches, known))
            if known and isinstance(state.rule.quorum, int) and state.rule.quorum > looked_at:
                looks = f"it watches {of_number(looked_at, 'site')}"
                raise ValueError(f"alert {state.name!r}: quorum={state.rule.quorum} can never be met: {looks}")

    def observe(self, step: int, values: Values) -> None:
        """Show a report to the rules."""
        for state in self.states:
            if state.quantity in values:
                event = state.observe(step, values[state.quantity], values.get(f"{state.quantity}_error", {}))
                if event is not None:
                    self.events = [*self.events, event][-KEPT:]
                    self._due.append((state.rule, event))

    def too_short(self) -> str:
        """Why no rule could fire in this run, by the one that was nearest; nothing if one could."""
        shown = [state for state in self.states if state.had_of_needed[0]]
        if not shown or any(state.could_fire for state in shown):
            return ""
        nearest = max(shown, key=lambda state: state.had_of_needed[0] / state.had_of_needed[1])
        had, needed = nearest.had_of_needed
        steps = f" and step {nearest.rule.warm_up_steps}" if nearest.rule.warm_up_steps else ""
        samples = of_number(needed, "sample")
        return f"no alert could fire in this run: {nearest.name} needs {samples}{steps}, and had {had}"

    def levels(self) -> dict[str, float]:
        """0, 1 or 2 of each rule that is logged: ok, pending, firing."""
        return {state.name: float(state.level) for state in self.states if "log" in state.rule.actions}

    def act(self, training: Training) -> list[str]:
        """Do what the rules ask for after a report; what went wrong, in words. To be called by all processes."""
        due, self._due = self._due, []
        failed = _all(lambda rule, event: self._tell(training, rule, event), due)
        # What all processes do together comes last, and whatever went wrong in one of them.
        firing = [(rule, event) for rule, event in due if event.state == "firing"]
        failed += _all(
            lambda _, event: actions.save_checkpoint(training, event),
            [f for f in firing if "checkpoint" in f[0].actions],
        )
        if any("stop" in rule.actions for rule, _ in firing):
            actions.stop(training)
        self._raising = next((event for rule, event in firing if "raise" in rule.actions), None)
        return failed + (self.calls.troubles() if self.calls else [])

    def raise_if_asked(self) -> None:
        """End the run, if it fired and its user wants that.

        Raises:
            AlertError: With the message of the alert.
        """
        event, self._raising = self._raising, None
        if event is not None:
            raise AlertError(event.message)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and words, which load with `weights_only=True`."""
        events = [asdict(event) | {"worst": [asdict(site) for site in event.worst]} for event in self.events]
        return {"rules": {state.name: state.state_dict() for state in self.states}, "events": events}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue a stopped run."""
        self.events = [
            AlertEvent(**{**event, "worst": tuple(SiteAlert(**site) for site in event["worst"])})
            for event in saved.get("events", ())
        ]
        for state in self.states:
            state.load_state_dict(saved.get("rules", {}).get(state.name, {}))

    def _tell(self, training: Training, rule: Alert, event: AlertEvent) -> None:
        """What the first process does by itself."""
        if training.team.rank != 0:
            return
        if rule.call is not None:
            self.calls.begin(rule.call, event, rule.call_timeout)
        errors = actions.write(training, self.label, self.events, event.step) if "log" in rule.actions else []
        errors += actions.alert_wandb(training, event) if "wandb" in rule.actions else []
        if "warn" in rule.actions:
            actions.warn(self.label, event)
        for error in errors:
            raise error


def _all(act: Callable[[Alert, AlertEvent], None], due: Sequence[tuple[Alert, AlertEvent]]) -> list[str]:
    """Do it for each, whatever goes wrong with the others; what did."""
    failed = []
    for rule, event in due:
        try:
            act(rule, event)
        except Exception as error:  # of a user's function or a full disk, which must not end the run
            failed.append(f"an action of an alert failed ({type(error).__name__}): {error}")
    return failed


def _state(rule: Alert, quantities: Sequence[str], prefix: str) -> RuleState:
    """A rule at work on what the monitor measures."""
    quantity = next((q for q in (rule.quantity, prefix + rule.quantity) if q in quantities), None)
    if quantity is None:
        nearest = get_close_matches(rule.quantity, quantities, 3, cutoff=0)
        raise ValueError(
            f"an alert uses {rule.quantity!r}, which is not measured; nearest: {nearest}; available: {list(quantities)}"
        )
    name = rule.name or "_".join([quantity, *rule.conditions])
    return RuleState(rule, quantity, name)
