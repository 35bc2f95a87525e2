"""Global variables that a training step names are put back or said by name, wherever it names them."""

from collections.abc import Iterator
from random import Random
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_lowrank import CurvatureMonitor, NTKMonitor
from lightning_lowrank.loss.snapshot import Snapshot
from lightning_lowrank.loss.variables import variables
from tests.trainings import QUIET, Classifier, digits

LISTED: list[int] = []
DRAWS, PYTHONS = torch.Generator().manual_seed(0), Random(0)
COUNT, UNUSED = 0, [1]
EXAMPLES: Iterator[Any] = iter(())


def counted() -> None:
    global COUNT
    COUNT += 1


class Drawing(Classifier):
    """Its loss depends on global variables, one of them in a function that it calls."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        counted()
        LISTED.append(batch_idx)
        noise = torch.rand((), generator=DRAWS) + PYTHONS.random() + 0.1 * len(LISTED) + COUNT
        return super().training_step(batch, batch_idx) * noise


class Taking(Classifier):
    """Takes its batches from a global iterator, in another method; its loader names what the step does not."""

    def train_dataloader(self) -> Any:
        assert UNUSED
        return super().train_dataloader()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.own_step()

    def own_step(self) -> Tensor:
        image, label = next(EXAMPLES)
        return cross_entropy(self(image[None]), label[None])


def test_those_that_are_named_are_found_and_no_others() -> None:
    assert {name for _, name in variables(Drawing.training_step, [Drawing])} == {"COUNT", "LISTED", "DRAWS", "PYTHONS"}
    assert [name for _, name in variables(Taking.training_step, [Taking])] == ["EXAMPLES"]
    assert variables(len, [Classifier]) == []


def test_what_was_written_is_as_before() -> None:
    before = COUNT
    snapshot = Snapshot(variables=variables(Drawing.training_step, [Drawing]))
    counted()
    snapshot.restore()

    assert before == COUNT


def trained(kind: type[Classifier], *monitors: L.Callback) -> dict[str, Tensor]:
    """The weights after eight steps."""
    global COUNT, EXAMPLES
    COUNT, EXAMPLES = 0, iter(digits(64))
    LISTED.clear()
    DRAWS.manual_seed(0)
    PYTHONS.seed(0)
    L.seed_everything(1, verbose=False)
    module = kind()
    L.Trainer(**QUIET, max_epochs=1, logger=False, callbacks=[*monitors]).fit(module)
    return module.state_dict()


@pytest.mark.filterwarnings("ignore:.*lightning_lowrank")
@pytest.mark.parametrize("monitor", [CurvatureMonitor, NTKMonitor])
@pytest.mark.parametrize("module", [Drawing, Taking])
def test_training_is_the_same_whatever_global_state_the_step_has(module: Any, monitor: Any) -> None:
    torch.testing.assert_close(trained(module, monitor(every_n_steps=3)), trained(module), rtol=0, atol=0)


def test_what_can_be_put_back_is_no_reason_to_refuse() -> None:
    monitor = NTKMonitor(every_n_steps=3)
    trained(Drawing, monitor)

    assert monitor.failures == 0


def test_an_iterator_is_said_by_name_where_the_step_would_run_again() -> None:
    with pytest.warns(UserWarning, match="EXAMPLES is an iterator"):
        trained(Taking, NTKMonitor(every_n_steps=3))
