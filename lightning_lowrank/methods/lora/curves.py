"""Curves of `LoRA`: how many directions its products use, from r x r cores; no product is formed.

Shape letters:  M outputs, N inputs of a layer   R rank of a pair   K directions
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.spectra.spectrum import full_precision, svd, working_dtype
from lightning_lowrank.measuring.number_source import Numbers, NumberSource, Quantity, led_by
from lightning_lowrank.methods.lora.adapters import Adapters
from lightning_lowrank.methods.lora.pairs import Place, as_weight, change, places, products
from lightning_lowrank.models.training import Training
from lightning_lowrank.monitors.curvature.monitor import CurvatureMonitor
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
    """Spectra of the products of LoRA pairs, and of their change of the pretrained weights.

    Args:
        act: The act that has the pairs.
        intruders: Number of top directions of the adapted weight to compare; 0 for none.
    """

    name = "lora"
    of_parameters = True

    def __init__(self, act: Adapters, intruders: int = 0, hessian: bool = False) -> None:
        self._act, self._intruders, self._hessian = act, intruders, hessian
        self.curvature: CurvatureMonitor | None = None
        sites = [Quantity(f"lora_{name}", unit, per_site=True) for name, unit in PER_SITE]
        if intruders:
            sites.append(Quantity("lora_intruders", "directions", per_site=True))
        if hessian:
            sites += [Quantity(f"lora_product_in_top{end}", per_site=True) for end in ("", "_chance")]
        self.quantities = led_by(CORE, sites)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of another training."""
        return vars(self) | {"curvature": None}

    def plan(self, training: Training) -> None:
        """Read the adapted weights."""

    def labels(self) -> list[str]:
        """One label for each pair."""
        return [label for label, *_ in self._pairs()]

    @torch.no_grad()
    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of the current factors."""
        found = []
        top = {id(p): d for p, d in self.curvature.top_directions()} if self.curvature is not None else {}
        for label, place, part, (a, b) in self._pairs():
            with full_precision(a.device), torch.autocast(a.device.type, enabled=False):
                values = self._of_pair(place, part, _wide(a).flatten(1), _wide(b))
                if id(a) in top and id(b) in top:
                    values |= in_top(_wide(a).flatten(1), _wide(b), _wide(top[id(a)]).flatten(2), _wide(top[id(b)]))
                found.append(Numbers(label, values))
        return found

    def detach(self) -> None:
        """There is nothing to drop."""

    def _pairs(self) -> Iterator[tuple[str, Place, str, tuple[Tensor, Tensor]]]:
        for place in places(self._act.module) if self._act.module is not None else ():
            for part, pair in products(place.holder).items():
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
    """How unbalanced two factors are: (half the sum of their energies - the nuclear norm of the product), divided by
    half that sum. It is 0 for balanced factors, and 1 if the product is zero.
    """
    energy = (a.square().sum() + b.square().sum()) / 2
    gap = energy - svd(core(b, a)).values.abs().sum().to(energy)
    return (gap / energy.clamp(min=torch.finfo(energy.dtype).tiny)).clamp(0, 1)


def in_top(
    a: Num[Tensor, "R N"], b: Num[Tensor, "M R"], da: Num[Tensor, "K R N"], db: Num[Tensor, "K M R"]
) -> dict[str, Tensor]:
    """Share of B A along the changes that top directions of the Hessian cause, and the same for as many random
    directions.
    """
    chance = len(da) * chance_in_top(a, b)
    return {"lora_product_in_top": share_in_top(a, b, da, db), "lora_product_in_top_chance": chance.clamp(max=1)}


def chance_in_top(a: Num[Tensor, "R N"], b: Num[Tensor, "M R"]) -> Float[Tensor, ""]:
    """Expected energy of B A along `B dA + dB A` for a random direction of the factors, divided by the expected energy
    of that.
    """
    inner, outer = a @ a.mT, b.mT @ b
    along = ((outer @ a).square().sum() + (b @ inner).square().sum()) / (outer * inner).sum()
    return along / (a.shape[1] * outer.trace() + len(b) * inner.trace())


def share_in_top(
    a: Num[Tensor, "R N"], b: Num[Tensor, "M R"], da: Num[Tensor, "K R N"], db: Num[Tensor, "K M R"]
) -> Float[Tensor, ""]:
    """Share of the energy of B A in the span of `B dA + dB A` over given directions of the factors. It uses products of
    narrow matrices, and is NaN if B A is zero.
    """
    left = torch.cat([torch.cat([db, b.expand_as(db)], -1), torch.cat([b, torch.zeros_like(b)], -1)[None]])
    right = torch.cat([torch.cat([a.expand_as(da), da], 1), torch.cat([a, torch.zeros_like(a)])[None]])
    lefts = torch.einsum("imr, jms -> ijrs", left, left)
    inner = (lefts * torch.einsum("irn, jsn -> ijrs", right, right)).sum((-2, -1))
    gram, along, energy = inner[:-1, :-1], inner[:-1, -1], inner[-1, -1]
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    shares = (vectors.mT @ along).square() / torch.where(kept, values, torch.inf)
    share: Tensor = shares.sum() / energy
    return share


def num_intruders(
    now: Num[Tensor, "M N"], base: Num[Tensor, "M N"], top: int, threshold: float = INTRUDER
) -> Float[Tensor, ""]:
    """Number of top left singular vectors of a weight whose largest absolute cosine with those of its base is below the
    threshold.

    References:
        Shuttleworth et al. (2024), LoRA vs Full Fine-tuning, arXiv:2410.21228, Section 3.
    """
    vectors = torch.linalg.svd(now, full_matrices=False)[0][:, :top]
    known = torch.linalg.svd(base, full_matrices=False)[0]
    nearest: Tensor = (known.mT @ vectors).abs().amax(0)
    return (nearest < threshold).sum().to(now.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, working_dtype(tensor.device)))
