"""Which weights are factorized, at which rank, and which are left alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from jaxtyping import Num
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_lowrank.methods.factorize.factors import Init, energy_rank
from lightning_lowrank.methods.factorize.layers import Factorized, Kind
from lightning_lowrank.methods.matrices import Owner, matrices, owners_of, sides
from lightning_lowrank.models.axes import is_transposed
from lightning_lowrank.models.effective_weights import hooked
from lightning_lowrank.models.names import chosen_parameters

Rank = int | float | str
Mode = Literal["module", "parametrize"]
When = Literal["start", "stable_rank_converged"]
CONVOLVING = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
PLAIN = "mode='parametrize' works for any matrix"


@dataclass(frozen=True)
class Settings:
    """Options of `LowRankFactorize`.

    Attributes:
        ranks: Patterns with their ranks. None as a pattern means all that `match` chooses; None as a rank means
            measured.
        init: Initial value of the factors.
        mode: Two layers instead of one, or a computed weight.
        when: Factorized from the start, or once the stable ranks have settled.
        match: Patterns of weights to factorize.
        exclude: Patterns of weights to leave out.
        seed: Seed for random factors.
    """

    ranks: tuple[tuple[str | None, Rank | None], ...]
    init: Init
    mode: Mode
    when: When
    match: tuple[str, ...] | None
    exclude: tuple[str, ...] | None
    seed: int

    @property
    def is_deferred(self) -> bool:
        """Whether the run begins dense, because the training determines the rank."""
        return self.when != "start" or any(rank == "measured" for _, rank in self.ranks)


@dataclass(frozen=True)
class Chosen:
    """A weight that can be factorized.

    Attributes:
        name: Its tag.
        owners: Layers that have it, under each of their names; several if it is shared.
        kind: How they use it.
        rank: The requested rank.
        shape: Rows and columns.
    """

    name: str
    owners: Sequence[Owner]
    kind: Kind
    rank: Rank | None
    shape: tuple[int, int]

    def matrix(self) -> Num[Tensor, "M N"]:
        """The weight."""
        owner = self.owners[0]
        weight: Tensor = getattr(owner.layer, owner.local)
        return weight.detach().flatten(1)

    def num_numbers(self, rank: int) -> int:
        """Number of entries of the factors."""
        return rank * (sum(self.shape) + 1)

    def saves(self, rank: int) -> bool:
        """Whether the factors are smaller than the weight."""
        return self.num_numbers(rank) < self.shape[0] * self.shape[1]

    def settled_rank(self, matrix: Num[Tensor, "M N"]) -> int:
        """The requested rank as a number; a share of the energy is taken of the given matrix."""
        if isinstance(self.rank, str):
            return energy_rank(matrix, share_of(self.rank))
        if isinstance(self.rank, float):
            return max(1, round(self.rank * min(self.shape)))
        assert self.rank is not None
        return min(self.rank, *self.shape)


@dataclass(frozen=True)
class Choice:
    """The result of choosing weights in a module.

    Attributes:
        chosen: Weights that can be factorized.
        left_out: Tags of matrices that are left alone, frozen ones included, each with the reason.
    """

    chosen: Sequence[Chosen]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def wanted(self) -> list[Chosen]:
        """Weights that should be factorized. A checkpoint may have factors of the others, too."""
        return [one for one in self.chosen if one.name not in self.left_out]


def share_of(rank: str) -> float:
    """The share of the energy that a rank in words requests; "measured" requests 95 %."""
    return float(rank.removeprefix("energy:")) if rank != "measured" else 0.95


def chosen(module: nn.Module, settings: Settings) -> Choice:
    """Choose the weights that can be factorized, and say why others are left alone.

    Raises:
        ValueError: A pattern matches nothing, or it matches a weight that cannot be factorized. The message has the
            reason.
    """
    adapter = next((name for name, _ in module.named_parameters() if "lora_" in name), None)
    if adapter is not None:
        raise ValueError(f"LowRankFactorize: the module has an adapter, {adapter!r}; merge it first")
    owners, layers = owners_of(module, all_names=True), dict(module.named_modules(remove_duplicate=False))
    explicit = settings.match is not None or settings.ranks[0][0] is not None
    patterns = settings.match or [pattern for pattern, _ in settings.ranks if pattern is not None] or None
    found = matrices(module, patterns, settings.exclude)
    left_out = dict(found.left_out)
    ranks = _ranks(module, settings, list(found.matrices))
    some = []
    for name, parameter in found.matrices.items():
        kind, trouble = _kind(owners[id(parameter)], layers, settings)
        if kind is not None:
            some.append(Chosen(name, owners[id(parameter)], kind, ranks[name], sides(parameter)))
            left_out |= {} if parameter.requires_grad else {name: "frozen"}
        elif explicit:
            raise ValueError(
                f"LowRankFactorize cannot factorize {name!r}: {trouble}; exclude it with exclude={name!r}, or "
                "change match"
            )
        else:
            left_out[name] = trouble
    if not some:
        refuse_nothing(left_out)
    return Choice(some, left_out)


def refuse_nothing(left_out: Mapping[str, str]) -> NoReturn:
    """Refuse a choice without weights.

    Raises:
        ValueError: There are none; the message has the reasons.
    """
    raise ValueError(f"LowRankFactorize: there is nothing to factorize; left out: {dict(left_out)}")


def _ranks(module: nn.Module, settings: Settings, names: Sequence[str]) -> dict[str, Rank | None]:
    """By tag; of several patterns that fit, the first counts."""
    ranks: dict[str, Rank | None] = {}
    for pattern, rank in settings.ranks:
        fit = names if pattern is None else chosen_parameters(module, pattern, None)
        ranks = {**dict.fromkeys(fit, rank), **ranks}
    return ranks


def _kind(owners: Sequence[Owner], layers: Mapping[str, nn.Module], settings: Settings) -> tuple[Kind | None, str]:
    """How a weight is read, None with the reason if it cannot be factorized."""
    kinds = [_kind_of(owner, layers, settings) for owner in owners]
    where = list({id(owner.layer): owner.path for owner in reversed(owners)}.values())[::-1]
    if len({kind for kind, _ in kinds}) > 1:
        return None, f"layers that use it in different ways share it: {where}"
    if len(where) > 1 and kinds[0][0] == "direct":
        return None, f"several layers share it: {where}; with mode='module', layers of one kind can share factors"
    return kinds[0]


def _kind_of(owner: Owner, layers: Mapping[str, nn.Module], settings: Settings) -> tuple[Kind | None, str]:
    layer, name = owner.layer, type(owner.layer).__name__
    if isinstance(layer, ParametrizationList) or hooked(layer):
        return None, "a parametrization, a norm or a mask computes it"
    if isinstance(layer, Factorized):
        return None, "it is already a factor; densify the module first"
    if isinstance(layer, nn.RNNBase):
        return None, f"{name} stores its weights in one block of memory"
    if settings.mode == "parametrize":
        return "direct", ""
    holder = layers.get(owner.path.rpartition(".")[0])
    attends = isinstance(holder, nn.MultiheadAttention) and layer is holder.out_proj
    if owner.local == "weight" and not attends:
        forward = type(layer).forward
        if forward is nn.Linear.forward:
            return "linear", ""
        if is_transposed(layer):
            return "transposed", ""
        if forward is nn.Embedding.forward:
            return _kind_of_embedding(layer, settings.init)
        if forward in CONVOLVING:
            grouped = getattr(layer, "groups", 1) > 1
            return (None, f"a grouped convolution; {PLAIN}") if grouped else ("convolution", "")
    return None, f"{name} uses the weight without calling the layer; {PLAIN}"


def _kind_of_embedding(layer: nn.Module, init: Init) -> tuple[Kind | None, str]:
    if init == "spectral" and getattr(layer, "padding_idx", None) is not None:
        return None, "an embedding with padding_idx, whose row must stay zero; use init='svd'"
    options = ("max_norm", "scale_grad_by_freq", "sparse")
    given = [option for option in options if getattr(layer, option, None)]
    return (None, f"an embedding with {given[0]}") if given else ("embedding", "")
