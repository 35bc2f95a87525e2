"""The source of `TrajectorySubspace`: parameters before the step, on due steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lowrank.distributed.shards import is_sharded
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Numbers, NumberSource, Quantity, led_by
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.models.names import chosen_parameters
from lightning_lowrank.models.training import Training
from lightning_lowrank.monitors.trajectory import path
from lightning_lowrank.monitors.trajectory.snapshots import Snapshots

NAMES = (*(f"explained_{k}" for k in path.COMPONENTS), "participation_ratio", "straightness")
UNITS = {"participation_ratio": "directions"}
CORE = [f"trajectory_{name}{end}" for name in ("explained_1", "participation_ratio") for end in ("", "_random_walk")]
# Fewer say nothing of four components after every second one is gone.
FEWEST = 8


class Trajectory(NumberSource):
    """Number of directions that the path of the parameters has used so far, compared with a random walk at the same
    times.

    Args:
        every_n_steps: Smallest number of optimizer steps between two snapshots.
        max_snapshots: Number of snapshots to keep.
        match: Parameters: globs, `re:REGEX`, `type:LAYERCLASS`; all that are trained at the start by default.
        exclude: Patterns of what to leave out, as for `match`.

    Raises:
        ValueError: `max_snapshots` is out of range; in `plan`: a pattern matches nothing, nothing is trained, or
            parameters are sharded.
    """

    name = "trajectory"
    of_parameters = False

    def __init__(
        self,
        every_n_steps: int,
        max_snapshots: int,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
    ) -> None:
        if type(max_snapshots) is not int or max_snapshots < FEWEST:
            raise ValueError(f"max_snapshots={max_snapshots!r} must be a whole number of at least {FEWEST}")
        self._match, self._exclude = match, exclude
        both = [name + end for name in NAMES for end in ("", "_random_walk")]
        quantities = [
            Quantity(f"trajectory_{name}", UNITS.get(name.removesuffix("_random_walk"), "1")) for name in both
        ]
        self.quantities = led_by(CORE, [*quantities, Quantity("trajectory_snapshots", "snapshots")])
        self._snapshots = Snapshots(every_n_steps, max_snapshots)
        self._found: dict[str, Tensor] = {}
        self._at = -1

    def plan(self, training: Training) -> None:
        """Refuse parameters that cannot be tracked."""
        chosen = chosen_parameters(training.module, self._match, self._exclude)
        sharded = next((name for name, parameter in chosen.items() if is_sharded(parameter)), None)
        if sharded is not None:
            raise ValueError(
                f"TrajectorySubspace: {sharded!r} is sharded, so no process has its whole path; use DDP, or choose "
                "other parameters with match"
            )
        if not any(parameter.requires_grad for parameter in chosen.values()):
            raise ValueError(f"TrajectorySubspace: none of the chosen parameters is trained: {list(chosen)[:10]}")

    def labels(self) -> list[str]:
        """The whole model."""
        return [WHOLE_MODEL]

    @torch.no_grad()
    def batch_begins(self, batch: Batch) -> None:
        """Read parameters, once a step."""
        step = batch.training.step
        if self._found and self._at == step:
            return
        times, gram = self._snapshots.seen(step, self._followed(batch.training.module))
        walk = {f"{name}_random_walk": value for name, value in path.of_a_random_walk(times).items()}
        known = path.numbers(gram) | walk | {"snapshots": torch.tensor(float(len(self._snapshots.times)))}
        self._found, self._at = {f"trajectory_{name}": value for name, value in known.items()}, step

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of the path so far."""
        found, self._found = self._found, {}
        return [Numbers(WHOLE_MODEL, found)]

    def facts(self) -> dict[str, float]:
        """Memory of the snapshots."""
        return {"bytes": float(self._snapshots.num_bytes)}

    def detach(self) -> None:
        """Drop the unfinished sample."""
        self._found = {}

    def state_dict(self) -> dict[str, Any]:
        """The snapshots."""
        return self._snapshots.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load those of the resumed run; another run has another path."""
        if state:
            self._snapshots.load_state_dict(state)
        else:
            self._snapshots.begin()

    def _followed(self, module: nn.Module) -> dict[str, Tensor]:
        """What is trained; once there is a snapshot, what that is of."""
        chosen = chosen_parameters(module, self._match, self._exclude)
        there = {name: p for name, p in chosen.items() if not is_lazy(p) and p.numel()}
        names = self._snapshots.names
        if names and set(names) <= set(there):
            return {name: there[name] for name in names}
        return {name: p for name, p in there.items() if p.requires_grad}
