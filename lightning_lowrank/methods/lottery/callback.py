"""`LotteryTicket`: the sparse net that trains as well as the whole one."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.methods.lottery.curves import TicketNumbers
from lightning_lowrank.methods.lottery.export import export
from lightning_lowrank.methods.lottery.masks import Scope
from lightning_lowrank.methods.lottery.pruning import Unit, pruning_of
from lightning_lowrank.methods.lottery.rounds import Rounds, Schedule
from lightning_lowrank.methods.method import Method


class LotteryTicket(Method):
    """Find a lottery ticket by iterative magnitude pruning with rewinding, within one `fit`.

    After each round of training, the share `prune` of the remaining weights with the smallest magnitudes is removed for
    good. Everything else is rewound to step `rewind_step` of the first round: weights, biases, buffers, learning rates
    and schedulers. Optimizers begin each round without state. After `rounds` rounds the trained network has `(1 -
    prune)^(rounds - 1)` of its weights. A Trainer needs `max_epochs = rounds * epochs_per_round`.

    Pruned weights are zeros in the module's own parameters. Keys, classes and parameters stay, and a checkpoint loads
    without this callback. The callback's state has the masks. A resumed run is bit for bit equal to an uninterrupted
    one, and a second `fit` of the same module keeps the masks. Biases, norms, embeddings and parameters that are frozen
    at the start are not pruned.

    With `units=("neuron", "head")`, whole hidden neurons, channels of convolutions and attention heads are removed. The
    score of a unit is the mean absolute gradient of a gate on it over the steps of the round, exactly as in
    `ConcentrationMonitor`. `export(module, inputs)` then returns a smaller dense module that computes the same.

    Curves: `ticket/density` and `ticket/round`, and `ticket/layer_density_{min,median,max}` over layers.

    Cost: one pass over masked weights and their gradients per step, and one sort of all magnitudes between rounds.
    Memory: one byte per weight and a copy of parameters and buffers, on the device and in checkpoints.

    Args:
        rounds: Number of rounds; the first one trains the whole network.
        epochs_per_round: Length of a round in epochs. Alternatively give `steps_per_round`.
        prune: Share of the remaining weights or units that is removed between two rounds.
        rewind_step: Optimizer step of the first round from which later rounds start; 0 for the initial weights.
        scope: "global" compares all layers with one another; gates are first divided by the norm of all gates of their
            layer. "layer" removes the same share from each layer. No layer loses all its units.
        match: Weights to prune, or weights that read the units: globs, `re:REGEX` or `type:LAYERCLASS`. Default: all
            matrices and kernels except embeddings.
        exclude: Patterns of weights to leave out.
        early_bird: End a round as soon as the mask for its pruning has settled, by the rule of `EarlyBirdAlert`. The
            last round trains for its full length, and then the run ends. With `rounds=2` this gives the early-bird
            ticket, of weights.
        look_every_n_steps: Optimizer steps between two checks of that mask.
        steps_per_round: Length of a round in optimizer steps, which your own loop needs.
        units: "weight", by magnitude; or "neuron", "head" or both, by gates. Each kind loses the share `prune`.
        heads: Number of heads by pattern of attention output projections, for attention that is not recognised.
        neurons: Layers whose inputs are neurons. Default: pairs of layers.
        every_n_steps: Optimizer steps between points of the curves.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single layers: `True`, `False`, or "auto" (from "standard" on, if there are at most 100).
        name: Prefix of all tags.

    Raises:
        ValueError: An option is out of range. When training starts: a pattern matches nothing, there are no such units,
            all are frozen, or parameters are sharded. Also if there is a second `LotteryTicket`, if a loop has no
            epochs, or if the resumed run pruned other weights.

    Examples:
        >>> LotteryTicket(rounds=10, epochs_per_round=5)
        LotteryTicket(rounds=10, epochs_per_round=5)

    References:
        Frankle & Carbin (2019), The Lottery Ticket Hypothesis, arXiv:1803.03635, for `prune`; Frankle et al. (2020),
        Linear Mode Connectivity and the Lottery Ticket Hypothesis, arXiv:1912.05671, for `rewind_step`;
        You et al. (2020), Drawing Early-Bird Tickets, arXiv:1909.11957, for `early_bird`.
    """

    word = "ticket"

    def __init__(
        self,
        rounds: int,
        epochs_per_round: int | None = None,
        prune: float = 0.2,
        rewind_step: int = 0,
        scope: Scope = "global",
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        early_bird: bool = False,
        *,
        look_every_n_steps: int = 10,
        steps_per_round: int | None = None,
        units: Unit | Sequence[Unit] = "weight",
        heads: Mapping[str, int] | None = None,
        neurons: str | Sequence[str] | None = None,
        every_n_steps: int = 50,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        name: str | None = None,
    ) -> None:
        if type(look_every_n_steps) is not int or look_every_n_steps < 1:
            raise ValueError(f"look_every_n_steps={look_every_n_steps!r} must be at least 1 optimizer step")
        look = look_every_n_steps if early_bird else 0
        schedule = schedule_of(rounds, epochs_per_round, steps_per_round, prune, rewind_step, scope, look)
        act = self._rounds = Rounds(pruning_of(units, match, exclude, heads, neurons), schedule)
        super().__init__(act, TicketNumbers(act), every_n_steps, detail=detail, per_site=per_site, seed=0, name=name)

    @property
    def round(self) -> int:
        """Number of the round, counted from 0."""
        return self._rounds.round

    @property
    def density(self) -> float:
        """Share of the weights, or of the units, that this round has, between 0 and 1."""
        return self._rounds.density()

    @staticmethod
    def export(module: nn.Module, inputs: Any, heads: Mapping[str, int] | None = None) -> nn.Module:
        """A smaller module that computes the same, without the neurons, channels and heads that no layer reads.

        A unit is removed if all weights that read it are zero, as after rounds with `units`. This removes rows of the
        layer that computes it, its bias, its entries in batch norms, and columns of the layers that read it. Each group
        of units is tested on the inputs in eval mode. It stays if outputs would change by more than 1e-5 of the largest
        one. An `nn.MultiheadAttention` that loses heads becomes a subclass, since its width includes all heads.
        Optimizers and masks of the original module do not fit the copy.

        Args:
            module: The trained module with a forward; it does not change.
            inputs: Inputs of its forward: a tensor, or several in a tuple.
            heads: Number of heads by pattern of output projections, for attention that is not recognised.

        Returns:
            A copy; all other layers keep their classes.

        Raises:
            ValueError: The module fails on the inputs, or no unit can be removed.
        """
        return export(module, inputs, heads or {})


def schedule_of(
    rounds: int, epochs: int | None, steps: int | None, prune: float, rewind_step: int, scope: Scope, look: int
) -> Schedule:
    """The options as a checked schedule.

    Raises:
        ValueError: An option is out of range.
    """
    if type(rounds) is not int or rounds < 2:
        raise ValueError(
            f"rounds={rounds!r} must be a whole number of at least 2; the first round trains the whole network"
        )
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs_per_round={epochs}, steps_per_round={steps}: give exactly one of them")
    length = epochs if steps is None else steps
    if type(length) is not int or length < 1:
        raise ValueError(f"epochs_per_round={epochs!r}, steps_per_round={steps!r} must be a whole number of at least 1")
    if not 0 < prune < 1:
        raise ValueError(f"prune={prune} must be above 0 and below 1")
    if type(rewind_step) is not int or rewind_step < 0 or (steps is not None and rewind_step >= steps):
        raise ValueError(f"rewind_step={rewind_step!r} must be a step of the first round, counted from 0")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope={scope!r} must be 'global' or 'layer'")
    return Schedule(rounds, length, steps is None, float(prune), rewind_step, scope, look)
