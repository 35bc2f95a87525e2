"""`ReLoRA`: training in full rank by restarts of low-rank training."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Detail, Numbers, Quantity
from lightning_lowrank.methods.lora.callback import LoRA, settings_of
from lightning_lowrank.methods.lora.curves import LoRANumbers
from lightning_lowrank.methods.lora.restarts import Reset, Restarts
from lightning_lowrank.methods.method import Method


class ReLoRANumbers(LoRANumbers):
    """Curves of `LoRA`, and those of restarts.

    Args:
        act: The act that has the pairs.
    """

    name = "relora"

    def __init__(self, act: Restarts) -> None:
        super().__init__(act)
        self._restarts = act
        more = [Quantity(f"relora_{name}", per_site=True) for name in ("rank_bound", "overlap", "overlap_random")]
        whole = [Quantity(f"relora_{name}", detail="core") for name in ("cycles", "reset_share")]
        self.quantities = [*self.quantities, *more, *whole]

    def labels(self) -> list[str]:
        """Also a label for the whole model."""
        return [WHOLE_MODEL, *super().labels()]

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Also the numbers of restarts."""
        act = self._restarts
        whole = {"cycles": float(act.cycle), "reset_share": act.share}
        found = [Numbers(WHOLE_MODEL, _tensors(whole))]
        sizes = {label: (place, part, len(b), a[0].numel()) for label, place, part, (a, b) in self._pairs()}
        for numbers in super().numbers(team):
            place, part, rows, columns = sizes[numbers.site]
            rank = place.recipe.rank
            more = {
                "rank_bound": float(min((act.cycle + 1) * rank, rows, columns)),
                "overlap_random": rank / rows,
                "overlap": act.overlap.get(place.name, {}).get(part, float("nan")),
            }
            found.append(Numbers(numbers.site, dict(numbers.values) | _tensors(more)))
        return found


class ReLoRA(LoRA):
    """Train in full rank by restarts of low-rank training: every so many steps, the pairs are added to the weights.

    A restart happens between two batches. `W` becomes `W + s B A`, A is drawn again and B is zero, so the function of
    the module does not change. The optimizer state of the pairs is set to zero according to `reset`. All learning rates
    then rise from `1 / rewarm` of their value to their value within `rewarm` steps, in addition to the user's
    scheduler. After c restarts, the rank of the total change is at most (c + 1) r.

    Parameters without pairs train in full (embeddings, norms, biases, the head), as in the paper. Options that are not
    described here are those of `LoRA`.

    Curves: those of `LoRA`, as `relora/...`; `relora_rank_bound`; `relora_overlap`, the mean squared cosine between the
    outputs of the last two cycles, with its chance value; and `relora/cycles` and `relora/reset_share`.

    Cost: that of `LoRA`, and the factors of all cycles in host memory and in checkpoints: (c r)(m + n) numbers per
    weight, at most twice the size of the weight.

    Args:
        every: Optimizer steps between two restarts.
        rewarm: Steps after a restart during which learning rates rise; 0 for none.
        reset: "zero" clears the state, including its step count. "magnitude:0.9" sets the entries of the smallest 90 %
            of the first moment to zero, in all moments; "random:0.999" does this for random entries. "none" keeps the
            state. The authors' code chooses entries separately for each moment. A nonzero first moment over a second
            moment of 0 then gives a step of `lr m / eps`.
        warm_start_steps: Steps at the start during which the weights train instead of the pairs. Not with several
            processes.
        r: Rank of all pairs, or a mapping from patterns to ranks.
        alpha: The scaling is alpha over r. Default: r.
        match: Weights to adapt, as in `LoRA`.
        exclude: Patterns of weights to leave out.
        train_also: Patterns of parameters to train in full. Default: all that are not adapted.
        rslora: Use alpha over the square root of r as the scaling.
        dropout: Share of the inputs that the branches drop in training.
        seed: Seed for random factors.
        every_n_steps: Optimizer steps between points of the curves.
        detail: What loggers get: "core", "standard" or "all".
        per_site: Curves of single pairs: `True`, `False`, or "auto".
        name: Prefix of all tags.

    Raises:
        ValueError: As `LoRA`, an option is out of range, an optimizer has no state for single parameters, or a warm
            start is requested with several processes.

    Examples:
        >>> ReLoRA(every=2000, reset="magnitude:0.9")
        ReLoRA(every=2000, reset='magnitude:0.9')

    References:
        Lialin et al. (2023), ReLoRA, arXiv:2307.05695. The shares 0.999 and 0.9 are those of the authors' code.
    """

    word = "relora"

    def __init__(
        self,
        every: int = 1000,
        rewarm: int = 100,
        reset: str = "zero",
        warm_start_steps: int = 0,
        r: int | Mapping[str, int] = 8,
        alpha: int | float | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        train_also: str | Sequence[str] = "*",
        rslora: bool = False,
        dropout: float = 0.0,
        *,
        seed: int = 0,
        every_n_steps: int = 50,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
    ) -> None:
        for word, value, least in (
            ("every", every, 1),
            ("rewarm", rewarm, 0),
            ("warm_start_steps", warm_start_steps, 0),
        ):
            if type(value) is not int or value < least:
                raise ValueError(f"{word}={value!r} must be a whole number of at least {least}")
        settings = settings_of(r, alpha, "default", match, exclude, train_also, rslora, dropout, seed)
        act = Restarts(settings, every=every, rewarm=rewarm, reset=Reset.of(reset), warm_start_steps=warm_start_steps)
        Method.__init__(
            self, act, ReLoRANumbers(act), every_n_steps, detail=detail, per_site=per_site, seed=seed, name=name
        )


def _tensors(values: Mapping[str, float]) -> dict[str, Tensor]:
    return {f"relora_{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
