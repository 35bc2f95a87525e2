"""Hooks of the user's own are called by the training's passes and by none of ours, whenever they were set.

Each hook here steers the training: it divides gradients by a running mean of their norms, so that one call more changes
the final weights.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_lowrank import Monitor
from tests.monitors import ANY, MONITORS
from tests.trainings import Classifier

QUIET: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Running:
    """A hook with a state."""

    def __init__(self) -> None:
        self.mean, self.calls = 1.0, 0

    def __call__(self, gradient: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * float(gradient.detach().norm())
        return gradient / (self.mean + 1e-6)


class Hooked(Classifier):
    """Sets its hooks at a moment that is to be chosen."""

    def __init__(self, when: str) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)), optimizer="sgd", lr=0.05)
        self.when, self.running = when, Running()

    def _set(self, when: str) -> None:
        if self.when == when:
            for parameter in self.parameters():
                parameter.register_hook(self.running)

    def on_fit_start(self) -> None:
        self._set("on_fit_start")

    def on_train_start(self) -> None:
        self._set("on_train_start")
        if self.when == "module":
            self.net[1].register_full_backward_hook(lambda _, __, gradients: (self.running(gradients[0]),))
        if self.when == "forward":
            self.net[1].register_forward_hook(lambda _, __, output: self.running(output))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        hidden = self.net[1](self.net[0](batch[0]))
        if self.when == "activation":
            hidden.register_hook(self.running)
        loss = cross_entropy(self.net[2](hidden), batch[1])
        self.losses.append(loss.item())
        return loss


def trained(when: str, *monitors: Monitor) -> Hooked:
    torch.manual_seed(0)
    module = Hooked(when)
    L.Trainer(max_steps=6, logger=False, callbacks=[*monitors], **QUIET).fit(module)
    return module


@pytest.mark.filterwarnings("ignore:.*lightning_lowrank")
@pytest.mark.parametrize("when", ["on_fit_start", "on_train_start", "module", "activation", "forward"])
def test_no_hook_of_the_user_is_called_by_us(when: str) -> None:
    alone, watched = trained(when), trained(when, *(make(every_n_steps=1) for make in ANY.values()))

    assert (watched.losses, watched.running.mean) == (alone.losses, alone.running.mean)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))
    assert watched.running.calls == alone.running.calls


class Kept(Classifier):
    """Takes from what the module keeps."""

    shared: ClassVar[list[float]] = []

    def __init__(self, fresh: Callable[[], Any]) -> None:
        super().__init__(optimizer="sgd", lr=0.05)
        self.fresh = fresh

    def on_train_start(self) -> None:
        self.other = self.fresh()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        more = next(self.other, None)
        if more is None:
            self.other = self.fresh()
            more = next(self.other)
        type(self).shared.append(float(more.mean()))
        loss = cross_entropy(self.net(batch[0]), batch[1]) + 0.1 * self.net(more).softmax(-1).var(0).sum()
        self.losses.append(loss.item())
        return loss


ROWS = torch.rand(12, 4, 64, generator=torch.Generator().manual_seed(0))
ITERATORS: dict[str, Callable[[], Any]] = {
    "of a list": lambda: iter(list(ROWS)),
    "a generator": lambda: (row for row in ROWS),
    "a map": lambda: map(torch.clone, ROWS),
}


@pytest.mark.filterwarnings("ignore:.*lightning_lowrank")
@pytest.mark.parametrize("kind", ITERATORS)
def test_an_iterator_that_the_step_takes_from_is_not_consumed_by_replays_and_is_named(kind: str) -> None:
    ends = []
    for monitors in ([], [make(every_n_steps=1) for make in ANY.values()]):
        torch.manual_seed(0)
        module = Kept(ITERATORS[kind])
        L.Trainer(max_steps=5, logger=False, callbacks=[*monitors], **QUIET).fit(module)
        ends.append((module.losses, [p.detach() for p in module.parameters()]))
    with pytest.warns(UserWarning, match=r"\.other is an iterator, a file, a socket or a queue.*give loss_fn"):
        L.Trainer(max_steps=1, logger=False, callbacks=[MONITORS["ntk"](every_n_steps=1)], **QUIET).fit(
            Kept(ITERATORS[kind])
        )

    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


class Sharing(Classifier):
    """Counts in the body of the class, which all instances share."""

    seen: ClassVar[list[int]] = []
    count = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch_idx)
        type(self).count += 1
        return super().training_step(batch, batch_idx)


def test_what_the_body_of_a_class_holds_is_put_back() -> None:
    Sharing.seen.clear()
    Sharing.count = 0
    monitors = [make(every_n_steps=1) for make in ANY.values()]
    L.Trainer(max_steps=4, logger=False, callbacks=monitors, **QUIET).fit(Sharing())

    assert (Sharing.seen, Sharing.count) == ([0, 1, 2, 3], 4)


def test_too_much_plain_data_on_the_module_is_said_and_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lowrank.loss.snapshot.MOST", 1000)
    module = Classifier()
    module.neighbours = [[i, i + 1] for i in range(2000)]

    with pytest.warns(UserWarning, match=r"more than 1,000 Python objects.*neighbours.*Keep data in tensors or arrays"):
        L.Trainer(max_steps=1, logger=False, callbacks=[MONITORS["ntk"](every_n_steps=1)], **QUIET).fit(module)
