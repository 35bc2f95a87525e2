"""What holds for every method: exact resumption, everything given back, monitors that may watch."""

import copy
import pickle
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from lightning_lowrank import RankMonitor, watching
from lightning_lowrank.methods.method import Method
from tests.methods import GIVE_BACK, METHODS, REFUSED
from tests.monitors import INCOMPLETE, watchers
from tests.processes import together
from tests.trainings import (
    CASES,
    COMPILED,
    QUIET,
    Classifier,
    InOrder,
    MemoryLogger,
    Ordered,
    Resumable,
    fitted,
    mlp,
    trained,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lightning_lowrank", "ignore:.*callbacks used to create the checkpoint"
)

every_method = pytest.mark.parametrize("name", METHODS)


class Deep(Ordered):
    """Three matrices; may be stopped at any step."""

    def __init__(self) -> None:
        super().__init__(mlp(32))


def fit(
    method: Method | None, *callbacks: L.Callback, resume: Path | None = None, **options: Any
) -> tuple[L.LightningModule, L.Trainer, MemoryLogger]:
    L.seed_everything(3, verbose=False)
    module, logger = Deep(), MemoryLogger()
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    acting = [] if method is None else [method]
    settings = QUIET | {"max_epochs": 3, "logger": logger, "num_sanity_val_steps": 0, "enable_checkpointing": keeps}
    trainer = L.Trainer(**settings | options, callbacks=[*acting, *callbacks])
    trainer.fit(module, ckpt_path=resume)
    return module, trainer, logger


def left(module: L.LightningModule, trainer: L.Trainer) -> dict[str, Any]:
    return {"weights": module.state_dict(), "optimizers": [o.state_dict() for o in trainer.optimizers]}


@cache
def whole(name: str, accumulate: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run that never stopped leaves behind, and its curves."""
    module, trainer, logger = fit(METHODS[name](), accumulate_grad_batches=accumulate)
    return left(module, trainer), logger.numbers()


def test_a_method_changes_the_training() -> None:
    plain = fit(None)[0].state_dict()

    for name in METHODS:
        weights = whole(name)[0]["weights"]
        assert weights.keys() != plain.keys() or any(not torch.equal(weights[key], plain[key]) for key in plain), name


@every_method
@pytest.mark.parametrize(("stop", "accumulate"), [(1, 1), (3, 1), (4, 1), (7, 1), (10, 1), (3, 2)])
def test_a_run_that_is_stopped_and_resumed_is_the_same_to_the_bit(
    stop: int, accumulate: int, name: str, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=stop)
    options = {"accumulate_grad_batches": accumulate}
    _, _, first = fit(METHODS[name](), keep, max_steps=stop, **options)
    (path,) = tmp_path.glob("*.ckpt")

    module, trainer, second = fit(METHODS[name](), resume=path, **options)

    expected, curves = whole(name, accumulate)
    assert_close(left(module, trainer), expected, rtol=0, atol=0)
    found = [logger.numbers() for logger in (first, second)]
    both = {tag: {**found[0].get(tag, {}), **found[1].get(tag, {})} for tag in curves}
    assert_close(both, curves, rtol=0, atol=0, equal_nan=True)


@every_method
def test_a_run_is_resumed_from_a_checkpoint_written_after_it(name: str, tmp_path: Path) -> None:
    _, trainer, _ = fit(METHODS[name](), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "after.ckpt")

    resumed, second, _ = fit(METHODS[name](), resume=tmp_path / "after.ckpt")

    assert_close(left(resumed, second), whole(name)[0], rtol=0, atol=0)


@every_method
def test_its_state_is_plain_tensors_and_numbers(name: str, tmp_path: Path) -> None:
    method = METHODS[name]()
    fit(method, max_steps=5)
    torch.save(method.state_dict(), tmp_path / "state.pt")

    loaded = torch.load(tmp_path / "state.pt", weights_only=True)

    assert_close(loaded["act"], method.state_dict()["act"], rtol=0, atol=0)


@every_method
def test_two_fits_of_one_method_are_each_as_the_first(name: str) -> None:
    method = METHODS[name]()
    fit(method, max_steps=5)

    module, trainer, _ = fit(method)

    assert_close(left(module, trainer), whole(name)[0], rtol=0, atol=0)


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@every_method
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_acts_as_the_method_does(how: str, name: str) -> None:
    method = METHODS[name]()
    fit(method, max_steps=5)

    module, trainer, _ = fit(COPIES[how](method))

    assert_close(left(module, trainer), whole(name)[0], rtol=0, atol=0)
    assert method.state_key == METHODS[name]().state_key or method._is_set_up


# Everything is given back


class Breaking(torch.optim.AdamW):
    """Fails in the middle of a step, when gradients are computed, if it is told to."""

    is_broken = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        if self.is_broken:
            raise KeyError("the user's own")
        super().step()
        return loss


def groups(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [
        {k: v for k, v in g.items() if k != "params"} | {"ids": list(map(id, g["params"]))}
        for g in optimizer.param_groups
    ]


def assert_given_back(module: L.LightningModule, optimizer: torch.optim.Optimizer, shapes: dict[str, Any]) -> None:
    assert {name: p.shape for name, p in module.named_parameters()} == shapes
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in module.parameters()]
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert all(p.grad is None or p.grad.shape == p.shape for p in module.parameters())


@every_method
def test_after_a_training_parameters_and_optimizer_are_the_users(name: str) -> None:
    shapes = {key: p.shape for key, p in Deep().named_parameters()}

    method = METHODS[name]()
    module, trainer, _ = fit(method, max_steps=6)

    (optimizer,) = trainer.optimizers
    assert_given_back(module, optimizer, {key: p.shape for key, p in module.named_parameters()})
    GIVE_BACK.get(name, lambda method, module: None)(method, module)
    assert {key: p.shape for key, p in module.named_parameters()} == shapes
    assert all(p.requires_grad and type(p) is torch.nn.Parameter for p in module.parameters())
    assert [type(layer) for layer in module.modules()] == [type(layer) for layer in Deep().modules()]
    plain = fit(None, max_steps=6)[1].optimizers[0]
    assert [{**g, "ids": 0} for g in groups(optimizer)] == [{**g, "ids": 0} for g in groups(plain)]


class Twice(Ordered):
    """A layer that is called twice, and a head."""

    def __init__(self) -> None:
        layer = torch.nn.Linear(64, 64)
        super().__init__(torch.nn.Sequential(layer, torch.nn.Tanh(), layer, torch.nn.Tanh(), torch.nn.Linear(64, 10)))


@pytest.mark.parametrize("name", GIVE_BACK)
def test_a_layer_that_is_called_twice_is_given_back(name: str) -> None:
    method, module, x = METHODS[name](), Twice(), torch.rand(5, 64)
    trainer = L.Trainer(**QUIET, max_steps=6, logger=False, callbacks=[method])
    if "by peft" in name or "adalora" in name:
        with pytest.raises(ValueError, match=r"several layers share it, \['net.0', 'net.2'\]"):
            trainer.fit(module)
        return
    trainer.fit(module)
    before = module.eval()(x)

    GIVE_BACK[name](method, module)

    assert_close(module(x), before, rtol=1e-4, atol=1e-5)
    assert list(module.state_dict()) == list(Twice().state_dict())
    assert module.net[0] is module.net[2] and type(module.net[0]) is torch.nn.Linear


LEAVES_FROZEN = [name for name in METHODS if name.startswith(("subspace", "lottery", "factorize"))]


@pytest.mark.parametrize("name", LEAVES_FROZEN)
def test_what_the_user_froze_is_left_alone_and_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    method, module = METHODS[name](), Deep()
    before = module.net[2].weight.requires_grad_(False).detach().clone()

    with caplog.at_level("INFO"):
        L.Trainer(**QUIET, max_steps=10, logger=False, callbacks=[method]).fit(module)

    assert any("net.2.weight (frozen)" in record.message for record in caplog.records)
    assert_close(module.net[2].weight.detach(), before, rtol=0, atol=0)
    GIVE_BACK.get(name, lambda method, module: None)(method, module)
    assert {key for key, p in module.named_parameters() if not p.requires_grad} == {"net.2.weight"}


@pytest.mark.parametrize("name", LEAVES_FROZEN)
def test_a_module_that_is_all_frozen_is_refused(name: str) -> None:
    module = Deep().requires_grad_(False)

    with pytest.raises(ValueError, match="frozen"):
        L.Trainer(**QUIET, max_steps=2, logger=False, callbacks=[METHODS[name]()]).fit(module)


@every_method
def test_a_step_that_fails_leaves_weights_as_they_were(name: str) -> None:
    class Broken(Deep):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Breaking(self.parameters(), lr=1e-2)

    module, kept = Broken(), {}

    class Keep(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            kept.update({key: p.detach().clone() for key, p in pl_module.named_parameters()})
            optimizer.is_broken = trainer.global_step == 2

    trainer = L.Trainer(**QUIET, max_epochs=1, logger=False, callbacks=[METHODS[name](), Keep()])

    with pytest.raises(KeyError, match="own"):
        trainer.fit(module)

    assert_given_back(module, trainer.optimizers[0], {key: value.shape for key, value in kept.items()})
    assert_close(dict(module.named_parameters()), kept, rtol=0, atol=0)


# Monitors may watch

WATCHED = ("plain", "accumulation", "16-mixed", "16-mixed, fused AdamW", "bf16-true", "two optimizers in turn")


@pytest.mark.parametrize(
    ("name", "case"), [pair for pair in product(("galore", "lora"), WATCHED) if pair not in REFUSED]
)
def test_training_is_the_same_with_all_monitors_at_once(name: str, case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    alone = trained(make, options(), [METHODS[name]()], tmp_path / "alone")
    for place in ("before", "after"):
        monitors, method = watchers(case), METHODS[name]()
        callbacks = [method, *monitors.values()] if place == "before" else [*monitors.values(), method]
        watched = trained(make, options(), callbacks, tmp_path / place)
        assert_close(watched, alone, rtol=0, atol=0, equal_nan=True)
        for key, monitor in monitors.items():
            assert (monitor.failures > 0) == ((key, case) in INCOMPLETE), key


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in METHODS for case in CASES if (name, case) not in REFUSED]
)
def test_every_way_to_train_ends_with_finite_weights_and_no_failure(name: str, case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    method = METHODS[name]()

    found = trained(make, options(), [method], tmp_path)

    assert all(value.isfinite().all() for value in found["state"].values())
    assert found["hooks of optimizers"] == [0] * len(found["optimizers"])
    assert method.failures == 0


@pytest.mark.parametrize(("name", "case"), REFUSED)
def test_what_a_method_cannot_act_on_it_refuses_before_training(name: str, case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    module = make()

    with pytest.raises(ValueError, match=REFUSED[name, case]):
        trained(lambda: module, options(), [METHODS[name]()], tmp_path)
    assert module.losses == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("what", "name"), [*product(["module"], METHODS), *product(COMPILED, list(METHODS)[:1])][1:])
def test_a_compiled_module_is_trained_as_one_that_is_not(what: str, name: str, tmp_path: Path) -> None:
    plain = trained(Classifier, {"max_epochs": 1}, [METHODS[name]()], tmp_path / "plain")
    method = METHODS[name]()

    found = trained(lambda: COMPILED[what]("aot_eager"), {"max_epochs": 1}, [method], tmp_path / "compiled")

    assert_close(list(found["state"].values()), list(plain["state"].values()), rtol=1e-3, atol=1e-5)
    assert method.failures == 0


# Loops and processes


def looped(method: Method, num_batches: int = 12, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """The training of `fit` in plain torch."""
    L.seed_everything(3, verbose=False)
    module, batches = Deep(), list(Resumable()) * 3
    method.prepare(module)
    optimizer = module.configure_optimizers()
    if state is not None:
        module.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizers"][0])
    with watching(module, optimizer, method) as watch:
        if state is not None:
            watch.load_state_dict(state["watch"])
        for images, labels in batches[0 if state is None else state["at"] : num_batches]:
            with watch.batch():
                optimizer.zero_grad()
                watch.loss(cross_entropy(module(images), labels)).backward()
                optimizer.step()
        kept = {"weights": module.state_dict(), "optimizers": [optimizer.state_dict()]}
        return copy.deepcopy(kept | {"watch": watch.state_dict(), "at": num_batches})


@every_method
def test_a_loop_trains_as_a_trainer_does(name: str) -> None:
    found = looped(METHODS[name]())

    assert_close({key: found[key] for key in ("weights", "optimizers")}, whole(name)[0], rtol=0, atol=0)


@every_method
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_loop_that_is_stopped_and_resumed_is_the_same_to_the_bit(stop: int, name: str) -> None:
    first = looped(METHODS[name](), stop)

    second = looped(METHODS[name](), state=first)

    assert_close({key: second[key] for key in ("weights", "optimizers")}, whole(name)[0], rtol=0, atol=0)


def in_processes(rank: int, size: int, root: Path) -> Any:
    found = {}
    for name, make in METHODS.items():
        if "warm start" in name:  # refused
            continue
        L.seed_everything(0, verbose=False)
        method, monitor, logger = make(every_n_steps=1), RankMonitor("gradients", every_n_steps=1), MemoryLogger()
        weights = fitted(InOrder(rank, size), [method, monitor], logger, size)
        found[name] = {"weights": weights, "state": method.state_dict()["act"], "failures": method.failures}
        found[name]["numbers"] = logger.numbers()
        if size > 1:  # gradients are then views of what DDP sends
            L.seed_everything(0, verbose=False)
            views = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)
            found[name]["views"] = fitted(
                InOrder(rank, size), [make(every_n_steps=1)], False, size, strategy=lambda views=views: views
            )
    return found


def test_two_processes_train_as_one_with_equal_states(tmp_path: Path) -> None:
    first, second = together(in_processes, tmp_path)
    alone = in_processes(0, 1, tmp_path)

    for name in alone:
        assert_close(first[name]["state"], second[name]["state"], rtol=0, atol=0)
        assert_close(first[name]["weights"], second[name]["weights"], rtol=0, atol=0)
        assert_close(first[name]["views"], first[name]["weights"], rtol=0, atol=0)
        assert_close(first[name]["weights"], alone[name]["weights"], rtol=1e-3, atol=1e-4)
        assert first[name]["numbers"].keys() == alone[name]["numbers"].keys()
        assert first[name]["failures"] == second[name]["failures"] == 0
