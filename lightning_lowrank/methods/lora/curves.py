"""What `LoRA` reports: how many directions its products use, by their r x r cores; no product is formed.

Shape letters:  M outputs, N inputs of a layer   R rank of a pair   K directions
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import full_precision, svd, working_dtype
from lightning_lowrank.measuring.number_source import Numbers, NumberSource, Quantity, led_by
from lightning_lowrank.methods.lora.adapters import Adapters
from lightning_lowrank.methods.lora.pairs import Place, as_weight, change, factors, places
from lightning_lowrank.models.training import Training
from lightning_lowrank.statistics.effective_rank import effective_rank
from lightning_lowrank.statistics.numerical_rank import numerical_rank
from lightning_lowrank.statistics.stable_rank import stable_rank

CORE = ("lora_stable_rank", "lora_utilisation", "lora_update_norm")
PER_SITE = (
    ("stable_rank", "directions"),
    ("effective_rank", "directions"),
    ("utilisation", "1"),
    ("schatten_gap", "1"),
    ("update_rank", "directions"),
    ("update_norm", "1"),
)
# Below this cosine to all directions of the base, a direction is an intruder.
INTRUDER = 0.5


class LoRANumbers(NumberSource):
    """Spectra of the products of LoRA pairs, and of what they have added to the pretrained weights.

    Args:
        act: Whose pairs they are.
        intruders: How many of the top directions of the adapted weight are looked at, 0 for none.
    """

    name = "lora"
    of_parameters = True

    def __init__(self, act: Adapters, intruders: int = 0) -> None:
        self._act, self._intruders = act, intruders
        sites = [Quantity(f"lora_{name}", unit, per_site=True) for name, unit in PER_SITE]
        if intruders:
            sites.append(Quantity("lora_intruders", "directions", per_site=True))
        self.quantities = led_by(CORE, sites)

    def plan(self, training: Training) -> None:
        """The weights are those that are adapted."""

    def labels(self) -> list[str]:
        """One for each pair."""
        return [label for label, *_ in self._pairs()]

    @torch.no_grad()
    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Those of the factors as they are."""
        found = []
        for label, place, part, (a, b) in self._pairs():
            with full_precision(a.device), torch.autocast(a.device.type, enabled=False):
                found.append(Numbers(label, self._of_pair(place, part, _wide(a).flatten(1), _wide(b))))
        return found

    def detach(self) -> None:
        """Nothing is kept."""

    def _pairs(self) -> Iterator[tuple[str, Place, str, tuple[Tensor, Tensor]]]:
        for place in places(self._act.module) if self._act.module is not None else ():
            for part, pair in factors(place.holder).items():
                yield f"{place.name}.{part}" if part else place.name, place, part, pair

    def _of_pair(self, place: Place, part: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        scaling, beside = place.recipe.scaling, self._act.beside(place.name, part)
        product = added = svd(core(b, a))
        if beside is not None:
            first, second = (_wide(t.to(a.device)).flatten(1) for t in beside)
            added = svd(core(torch.cat([b, second], 1), torch.cat([a, first])))
        values = {
            "stable_rank": stable_rank(product),
            "effective_rank": effective_rank(product),
            "utilisation": stable_rank(product) / place.recipe.rank,
            "schatten_gap": schatten_gap(a, b),
            "update_rank": numerical_rank(added),
            "update_norm": scaling * added.energy.sqrt() / place.matrix().norm(),
        }
        if self._intruders:
            values["intruders"] = self._num_intruders(place)
        return {f"lora_{name}": value for name, value in values.items()}

    def _num_intruders(self, place: Place) -> Tensor:
        now = _wide(place.weight) + as_weight(change(place.holder), place.recipe, place.weight.shape)
        return num_intruders(_wide(now).flatten(1), self._base(place).flatten(1), self._intruders)

    def _base(self, place: Place) -> Tensor:
        """The weight before it was adapted."""
        weight = _wide(place.weight)
        found = [self._act.beside(place.name, part) for part, _ in place.recipe.parts]
        pieces = [_wide(pair[1].to(weight)) @ _wide(pair[0].to(weight)).flatten(1) for pair in found if pair]
        if not pieces:
            return weight
        order, whole = getattr(place.holder, "lora_order", None), torch.cat(pieces)
        whole = (whole if order is None else whole[order]) * place.recipe.scaling
        return weight - as_weight(whole, place.recipe, place.weight.shape)


def core(b: Num[Tensor, "M R"], a: Num[Tensor, "R N"]) -> Float[Tensor, "S T"]:
    """A matrix of r x r, or smaller, with the singular values of B A."""
    left: Tensor = torch.linalg.qr(b)[1]
    right: Tensor = torch.linalg.qr(a.mT)[1]
    return left @ right.mT


def schatten_gap(a: Num[Tensor, "R N"], b: Num[Tensor, "M R"]) -> Float[Tensor, ""]:
    """How far two factors are from balance: by what half the sum of their energies exceeds the nuclear norm of their
    product, relative to that sum; 0 where they are balanced, 1 where the product is zero.
    """
    energy = (a.square().sum() + b.square().sum()) / 2
    gap = energy - svd(core(b, a)).values.abs().sum().to(energy)
    return (gap / energy.clamp(min=torch.finfo(energy.dtype).tiny)).clamp(0, 1)


def num_intruders(
    now: Num[Tensor, "M N"], base: Num[Tensor, "M N"], top: int, threshold: float = INTRUDER
) -> Float[Tensor, ""]:
    """How many of the top left singular vectors of a weight are near none of those of its base: their largest absolute
    cosine is below the threshold.

    References:
        Shuttleworth et al. (2024), LoRA vs Full Fine-tuning, arXiv:2410.21228, Section 3.
    """
    vectors = torch.linalg.svd(now, full_matrices=False)[0][:, :top]
    known = torch.linalg.svd(base, full_matrices=False)[0]
    nearest: Tensor = (known.mT @ vectors).abs().amax(0)
    return (nearest < threshold).sum().to(now.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, working_dtype(tensor.device)))
