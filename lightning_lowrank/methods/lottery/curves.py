"""Curves of `LotteryTicket`: the round, and the share of weights left in each layer."""

from collections.abc import Sequence

import torch

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.number_source import WHOLE_MODEL, Numbers, NumberSource, Quantity
from lightning_lowrank.methods.lottery.rounds import Rounds
from lightning_lowrank.models.training import Training


class TicketNumbers(NumberSource):
    """Densities of the masks.

    Args:
        rounds: The act that has the masks.
    """

    name = "ticket"
    quantities = (
        Quantity("ticket_density", detail="core"),
        Quantity("ticket_round", detail="core"),
        Quantity("ticket_layer_density", per_site=True, detail="core"),
    )

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds

    def plan(self, training: Training) -> None:
        """Read the weights that may be pruned."""

    def labels(self) -> list[str]:
        """One label for each weight, and one for the whole model."""
        return [WHOLE_MODEL, *self._rounds.weights]

    def numbers(self, team: Team) -> Sequence[Numbers]:
        """Numbers of the current masks."""
        rounds = self._rounds
        whole = {"ticket_density": rounds.density(), "ticket_round": float(rounds.round)}
        found = [Numbers(WHOLE_MODEL, {name: torch.tensor(value) for name, value in whole.items()})]
        for tag in rounds.weights:
            density = rounds.masks[tag].float().mean() if tag in rounds.masks else torch.tensor(1.0)
            found.append(Numbers(tag, {"ticket_layer_density": density}))
        return found

    def detach(self) -> None:
        """There is nothing to drop."""
