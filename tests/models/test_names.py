"""Names of places: tags of their own for layers whose names become equal when cleaned."""

from typing import Any

import lightning as L
import pytest
from torch import Tensor, nn

from lightning_lowrank.models.names import tags
from tests.monitors import MONITORS
from tests.trainings import QUIET, Classifier


def test_every_name_has_a_tag_of_its_own() -> None:
    assert tags(["a b", "a_b", "a_b_2", "module.a_b", "c"]) == {
        "a b": "a_b",
        "a_b": "a_b_2",
        "a_b_2": "a_b_2_2",
        "module.a_b": "a_b_3",
        "c": "c",
    }


class Blocks(nn.Module):
    """Two blocks of attention and a perceptron, under names that the caller chooses."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.names = (first, second)
        for name in self.names:
            attention = nn.MultiheadAttention(8, 2, batch_first=True)
            perceptron = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
            self.add_module(name, nn.ModuleDict({"attention": attention, "perceptron": perceptron}))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 8, 8)
        for name in self.names:
            block: Any = getattr(self, name)
            x = block["perceptron"](x + block["attention"](x, x, x, need_weights=False)[0])
        return self.head(x.flatten(1))


def sites(monitor: Any, *names: str) -> dict[str, int]:
    """How many sites each quantity has a number of."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(max_steps=1, logger=False, accelerator="cpu", callbacks=[monitor], **QUIET)
    trainer.fit(Classifier(Blocks(*names)))
    assert monitor.latest is not None
    return {quantity: len(values) for quantity, values in monitor.latest.values.items()}


@pytest.mark.filterwarnings("ignore:lightning_lowrank")  # what these small layers have not
@pytest.mark.parametrize("name", MONITORS)
def test_layers_whose_names_become_equal_are_all_watched(name: str) -> None:
    assert sites(MONITORS[name](), "a b", "a_b") == sites(MONITORS[name](), "first", "second")
