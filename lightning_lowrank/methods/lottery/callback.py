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
    """Finds a lottery ticket by iterative magnitude pruning with rewinding, within one `fit`.

    Each round trains; then the smallest share `prune` of the weights that are left goes for good, and everything else
    goes back to where it was at step `rewind_step` of the first round: weights, biases, buffers, learning rates and
    schedulers. Optimizers begin each round with no state. After `rounds` rounds the net has `(1 - prune)^(rounds - 1)`
    of its weights, trained. A Trainer needs `max_epochs = rounds * epochs_per_round`.

    Pruned weights are zeros of the module's own parameters: keys, classes and parameters stay, and a checkpoint loads
    without this callback. Masks are in the callback's state: a run that is resumed is equal to one that never stopped
    to the bit, and a second `fit` of the same module keeps them. Biases, norms, embeddings and what is frozen at the
    start are not pruned.

    With `units=("neuron", "head")` whole hidden neurons, channels of convolutions and attention heads go: those on
    which a gate has the smallest mean gradient over the steps of the round, exactly as `ConcentrationMonitor` reads it.
    `export(module, inputs)` then gives a smaller dense module that computes the same.

    Writes `ticket/density` and `ticket/round`, and `ticket/layer_density_{min,median,max}` over layers.

    Cost: a pass over masked weights and their gradients each step; a sort of all magnitudes between two rounds. Memory:
    one byte per weight, and a copy of parameters and buffers, on the device and in checkpoints.

    Args:
        rounds: Trainings, the first of them of the whole net.
        epochs_per_round: Length of a round; or give `steps_per_round`.
        prune: Share of the weights, or units, left that goes between two rounds.
        rewind_step: The optimizer step of the first round that the others start from; 0 for the initial weights.
        scope: "global": magnitudes of all layers are compared, or gates over the length of all gates of their layer;
            "layer": each layer loses the same share. No layer loses all its units.
        match: Weights, or those that read the units: globs, `re:REGEX`, `type:LAYERCLASS`; all matrices and kernels but
            embeddings unless given.
        exclude: The same, taken away.
        early_bird: A round ends as soon as the mask that it would be pruned to has settled, by the rule of
            `EarlyBirdAlert`; the last round trains for its whole length, and then the run ends. With `rounds=2` this is
            the early-bird ticket, of weights.
        look_every_n_steps: Optimizer steps between two looks at that mask.
        steps_per_round: Length of a round in optimizer steps, as a loop of your own needs it.
        units: "weight", by magnitude; or "neuron", "head" or both, by gates. Each kind loses its share.
        heads: Number of heads by pattern of output projections of attention that are not found.
        neurons: Layers whose inputs are neurons; pairs of layers unless given.
        every_n_steps: Cadence of the curves, in optimizer steps.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Scalars of single layers: `True`, `False`, or "auto": from "standard" on, if there are at most 100.
        name: Prefix of all tags.

    Raises:
        ValueError: An option is out of its range. When training starts: a pattern fits nothing, there are no such
            units or all are frozen, parameters are sharded, there is a second `LotteryTicket`, a loop has no epochs, or
            the run that is resumed pruned other weights.

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
            raise ValueError(f"look_every_n_steps={look_every_n_steps!r}: at least 1 optimizer step")
        look = look_every_n_steps if early_bird else 0
        schedule = schedule_of(rounds, epochs_per_round, steps_per_round, prune, rewind_step, scope, look)
        act = self._rounds = Rounds(pruning_of(units, match, exclude, heads, neurons), schedule)
        super().__init__(act, TicketNumbers(act), every_n_steps, detail=detail, per_site=per_site, seed=0, name=name)

    @property
    def round(self) -> int:
        """Number of the round, from 0 on."""
        return self._rounds.round

    @property
    def density(self) -> float:
        """Part of the weights, or of the units, that this round has, between 0 and 1."""
        return self._rounds.density()

    @staticmethod
    def export(module: nn.Module, inputs: Any, heads: Mapping[str, int] | None = None) -> nn.Module:
        """A smaller module that computes the same: without the neurons, channels and heads that nothing reads.

        A unit goes when all that reads it is zeros, as rounds with `units` leave it: rows of the layer that makes it,
        its bias, what batch norms have of it, and columns of what reads it. Each group of units is tried on the inputs
        in eval mode, and stays where the outputs would differ by more than 1e-5 of the largest. An
        `nn.MultiheadAttention` that loses heads becomes a subclass, as its own width is that of all. Optimizers and
        masks of the whole module do not fit the copy.

        Args:
            module: With a forward, as trained; it stays as it is.
            inputs: Of its forward: a tensor, or several in a tuple.
            heads: Number of heads by pattern of output projections that are not found.

        Returns:
            A copy; all other layers are of the same classes.

        Raises:
            ValueError: The module does not compute on the inputs, or no unit can be removed.
        """
        return export(module, inputs, heads or {})


def schedule_of(
    rounds: int, epochs: int | None, steps: int | None, prune: float, rewind_step: int, scope: Scope, look: int
) -> Schedule:
    """What was asked for.

    Raises:
        ValueError: Something is out of its range.
    """
    if type(rounds) is not int or rounds < 2:
        raise ValueError(f"rounds={rounds!r}: a whole number from 2 on, the training of the whole net included")
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs_per_round={epochs}, steps_per_round={steps}: give one of both")
    length = epochs if steps is None else steps
    if type(length) is not int or length < 1:
        raise ValueError(f"epochs_per_round={epochs!r}, steps_per_round={steps!r}: a whole number from 1 on")
    if not 0 < prune < 1:
        raise ValueError(f"prune={prune}: a share between 0 and 1")
    if type(rewind_step) is not int or rewind_step < 0 or (steps is not None and rewind_step >= steps):
        raise ValueError(f"rewind_step={rewind_step!r}: a step of the first round, from 0 on")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope={scope!r}: 'global' or 'layer'")
    return Schedule(rounds, length, steps is None, float(prune), rewind_step, scope, look)
