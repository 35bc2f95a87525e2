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
    """What `LoRA` reports, and what restarts have done.

    Args:
        act: Whose pairs they are.
    """

    name = "relora"

    def __init__(self, act: Restarts) -> None:
        super().__init__(act)
        self._restarts = act
        more = [Quantity(f"relora_{name}", per_site=True) for name in ("rank_bound", "overlap", "overlap_random")]
        whole = [Quantity(f"relora_{name}", detail="core") for name in ("cycles", "reset_share")]
        self.quantities = [*self.quantities, *more, *whole]

    def labels(self) -> list[str]:
        """Also the whole model."""
        return [WHOLE_MODEL, *super().labels()]

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Also those of restarts."""
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
    """Trains in full rank by restarts of low-rank training: every so many steps the pairs go into the weights.

    At a restart, between two batches, `W` becomes `W + s B A`, A is drawn anew and B is zero, so that the function
    stays as it was; entries of what the optimizer keeps of the pairs become zero as `reset` says; and learning rates of
    all parameters rise from `1 / rewarm` of what they are to that within `rewarm` steps, on top of the user's
    scheduler. The rank of what was added after c restarts is up to (c + 1) r.

    What is not adapted trains whole (embeddings, norms, biases, the head), as the authors have it. The options that are
    not named here are those of `LoRA`.

    Writes what `LoRA` does, as `relora/...`, and `relora_rank_bound`, `relora_overlap` (mean squared cosine between the
    outputs of the last two cycles) beside that of chance, `relora/cycles` and `relora/reset_share`.

    Cost: beside that of `LoRA`, factors of all cycles on the host and in checkpoints: (c r)(m + n) numbers per weight,
    up to twice the weight.

    Args:
        every: Optimizer steps between two restarts.
        rewarm: Steps in which learning rates rise after a restart; 0 for none.
        reset: "zero" begins the state anew, its count of steps too; "magnitude:0.9" sets the entries of the smallest
            90 % of the first moment to zero, in all moments; "random:0.999" as many at random; "none". The authors'
            code chooses entries of each moment by itself, which leaves first moments over second ones of 0: steps of
            `lr m / eps`.
        warm_start_steps: Steps before, in which the weights train and the pairs do not. Not with several processes.
        r: Rank of all pairs, or one for each pattern.
        alpha: The scaling is alpha over r; that of r itself unless given.
        match: Weights that are adapted; as in `LoRA`.
        exclude: The same, taken away.
        train_also: Parameters that train whole; all that are not adapted unless given.
        rslora: The scaling is alpha over the root of r.
        dropout: Share of the inputs that the branches do not see in training.
        seed: Of what is drawn.
        every_n_steps: Cadence of the curves, in optimizer steps.
        detail: What loggers get: "core", "standard" or "all".
        per_site: Scalars of single pairs: `True`, `False`, or "auto".
        name: Prefix of all tags.

    Raises:
        ValueError: As `LoRA`; an option is out of its range; an optimizer has no state of single parameters; a warm
            start with several processes.

    Examples:
        >>> ReLoRA(every=2000, reset="magnitude:0.9")
        ReLoRA(every=2000, reset='magnitude:0.9')

    References:
        Lialin et al. (2023), ReLoRA, arXiv:2307.05695; the authors' code, of which 0.999 and 0.9 are the shares.
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
                raise ValueError(f"{word}={value!r}: a whole number from {least} on")
        settings = settings_of(r, alpha, "default", match, exclude, train_also, rslora, dropout, seed)
        act = Restarts(settings, every=every, rewarm=rewarm, reset=Reset.of(reset), warm_start_steps=warm_start_steps)
        Method.__init__(
            self, act, ReLoRANumbers(act), every_n_steps, detail=detail, per_site=per_site, seed=seed, name=name
        )


def _tensors(values: Mapping[str, float]) -> dict[str, Tensor]:
    return {f"relora_{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
