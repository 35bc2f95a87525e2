"""Whether a loss can be differentiated twice, and where, is said in words, before it goes wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lightning_lowrank.distributed.team import Team
from lightning_lowrank.loss.double_backward import Choice, choose, look, look_together
from lightning_lowrank.models.taps import first_compiled
from lightning_lowrank.watching.trainer import TrainerTraining
from tests.processes import together
from tests.trainings import Adversaries, Classifier


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)


class Step(Classifier):
    """Compiled by its author."""

    @torch.compile(backend="eager")
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Left(Classifier):
    """Left alone by the compiler."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def in_place() -> Classifier:
    module = Classifier()
    module.compile(backend="eager")
    return module


def by_method() -> Classifier:
    module = Classifier()
    module.net[0].forward = torch.compile(module.net[0].forward, backend="eager")  # type: ignore[method-assign, operator, index]
    return module


def from_compiled() -> Any:
    from lightning.pytorch.utilities.compile import from_compiled

    return from_compiled(torch.compile(Classifier(), backend="eager"))  # type: ignore[arg-type]


COMPILED: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "plain": (Classifier, None),
    "disabled": (Left, None),
    "step": (Step, "Step"),
    "in place": (in_place, "Classifier"),
    "method": (by_method, "net.0"),
    "layer": (lambda: Classifier(nn.Sequential(torch.compile(nn.Linear(64, 10), backend="eager"))), "net.0"),
    "module": (from_compiled, "Classifier"),
}


@pytest.mark.filterwarnings("ignore:.*torch.compile")
@pytest.mark.parametrize("what", COMPILED)
def test_a_compiled_part_is_found(what: str) -> None:
    make, path = COMPILED[what]

    assert first_compiled(make()) == path


def hooked_parameter() -> Classifier:
    module = Classifier()
    module.net[0].weight.register_hook(lambda gradient: gradient)  # type: ignore[index, union-attr]
    return module


def hooked_layer() -> Classifier:
    module = Classifier()
    module.net[0].register_full_backward_hook(lambda *_: None)  # type: ignore[index]
    return module


class Iterating(Classifier):
    """Takes its own batches."""

    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


def a_loss(module: Any, batch: Any) -> Tensor:
    return module(batch[0]).mean()


CHOICES: dict[str, tuple[Callable[[], L.LightningModule], dict[str, Any], Choice]] = {
    "plain": (Classifier, {}, Choice("inline", "the graph of each step's own loss")),
    "a fixed batch": (Classifier, {"batch": "fixed"}, Choice("replay", "the fixed batch")),
    "a loss function": (Adversaries, {"loss_fn": a_loss}, Choice("replay", "loss_fn, which was given")),
    "compiled": (in_place, {}, Choice("replay", "the compiled module 'Classifier'")),
    "a hook of a parameter": (
        hooked_parameter,
        {},
        Choice("replay", "the hooks of 'net.0.weight', which would also run"),
    ),
    "a hook of a layer": (hooked_layer, {}, Choice("replay", "the backward hooks of 'net.0', which would also run")),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_way_is_chosen_before_training_with_a_reason(case: str) -> None:
    make, options, expected = CHOICES[case]

    assert choose(TrainerTraining(trainer(), make()), **options) == expected


def test_static_graphs_of_data_parallel_training_are_left_alone() -> None:
    found = choose(TrainerTraining(trainer(strategy=DDPStrategy(static_graph=True)), Classifier()))

    assert found == Choice("replay", "DDP's static_graph=True, which counts backward passes")


@pytest.mark.parametrize("make", [Adversaries, Iterating])
def test_a_step_that_cannot_be_run_again_is_seen_on_its_live_graph(make: Callable[[], L.LightningModule]) -> None:
    found = choose(TrainerTraining(trainer(), make()))

    assert found.mode == "inline" and "give loss_fn(module, batch) -> loss" in str(found.only)


@pytest.mark.parametrize("make", [Adversaries, Iterating])
def test_a_fixed_batch_for_a_step_that_cannot_be_run_again_is_refused(make: Callable[[], L.LightningModule]) -> None:
    with pytest.raises(ValueError, match=r"because of the fixed batch; but .* cannot be run again.*give loss_fn"):
        choose(TrainerTraining(trainer(), make()), batch="fixed")


class OfTwo(TrainerTraining):
    team = Team(0, 2)


def test_synchronised_batch_normalisation_of_several_processes_is_refused() -> None:
    module = Classifier(nn.Sequential(nn.Linear(64, 10), nn.SyncBatchNorm(10)))

    assert choose(TrainerTraining(trainer(), module)).mode == "inline"
    with pytest.raises(
        ValueError, match=r"'net\.1': .* SyncBatchNorm, .*use BatchNorm or GroupNorm; critical sharpness"
    ):
        choose(OfTwo(trainer(), module))


def sharded(rank: int, size: int, root: Path) -> str:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    module = Classifier()
    fully_shard(module.net[0], mesh=init_device_mesh("cpu", (size,)))  # type: ignore[index, arg-type]
    try:
        choose(TrainerTraining(trainer(), module))
    except ValueError as error:
        return str(error)
    finally:
        torch.distributed.destroy_process_group()
    return ""


@pytest.mark.slow
def test_sharded_parameters_are_refused_with_what_remains(tmp_path: Path) -> None:
    for message in together(sharded, tmp_path):
        assert (
            message.startswith("'net.0.weight' is sharded")
            and "critical sharpness needs forward passes only" in message
        )


def attention(kernel: SDPBackend) -> Tensor:
    x = torch.ones(1, 2, 8, 4, requires_grad=True)
    with sdpa_kernel(kernel):
        return nn.functional.scaled_dot_product_attention(x, x, x).sum() * 2


INLINE, REPLAY = Choice("inline", "of itself"), Choice("replay", "of itself")


def test_fused_attention_in_the_graph_calls_for_a_replay() -> None:
    assert look(INLINE, attention(SDPBackend.FLASH_ATTENTION)) == Choice("replay", "its fused attention")


@pytest.mark.parametrize("choice", [INLINE, REPLAY])
def test_plain_attention_in_the_graph_leaves_the_choice(choice: Choice) -> None:
    assert look(choice, attention(SDPBackend.MATH)) == choice


def test_fused_attention_in_a_step_that_cannot_be_run_again_is_refused() -> None:
    with pytest.raises(ValueError, match="twice through its fused attention; give loss_fn"):
        look(Choice("inline", "of itself", "give loss_fn"), attention(SDPBackend.FLASH_ATTENTION))


def test_fused_attention_that_stays_in_a_replay_is_refused() -> None:
    with pytest.raises(ValueError, match="its fused attention, not even in a replay; critical sharpness"):
        look(REPLAY, attention(SDPBackend.FLASH_ATTENTION))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_function_in_the_graph_calls_for_a_replay() -> None:
    squared = torch.compile(lambda x: x.square().sum(), backend="aot_eager")

    assert look(INLINE, squared(torch.ones(2, requires_grad=True))) == Choice("replay", "a compiled function")


def test_reentrant_checkpoints_are_refused_with_what_to_do() -> None:
    x = torch.ones(2, requires_grad=True)
    loss = checkpoint(torch.sin, x, use_reentrant=True).sum()

    with pytest.raises(ValueError, match=r"reentrant checkpointing; call checkpoint\(\.\.\., use_reentrant=False\)"):
        look(INLINE, loss)


def test_other_checkpoints_leave_the_choice() -> None:
    x = torch.ones(2, requires_grad=True)

    assert look(INLINE, checkpoint(torch.sin, x, use_reentrant=False).sum()) == INLINE


class FlashAttnFunc(torch.autograd.Function):
    """Goes by the name of that of flash-attn, which is not installed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0]


def test_kernels_of_other_packages_are_refused_with_what_to_use_instead() -> None:
    loss = FlashAttnFunc.apply(torch.ones(2, requires_grad=True)).sum()

    with pytest.raises(ValueError, match="kernels of flash-attn; use scaled_dot_product_attention"):
        look(INLINE, loss)


class Marked(torch.autograd.Function):
    """Its author has written no second derivative, of which torch says nothing where the first is used."""

    forward = staticmethod(FlashAttnFunc.forward)
    backward = staticmethod(once_differentiable(FlashAttnFunc.backward))


def test_functions_that_are_marked_as_differentiable_once_are_refused_by_name() -> None:
    loss = Marked.apply(torch.ones(2, requires_grad=True)).sum()

    with pytest.raises(ValueError, match="twice through Marked, whose backward is marked @once_differentiable"):
        look(INLINE, loss)


def of_two_kinds(rank: int, size: int, root: Path) -> list[str]:
    """The kernel of attention may depend on the batch, and with it what each process sees."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    team, plain = Team(rank, size), torch.ones(2, requires_grad=True).sin().sum()
    found = [look_together(INLINE, plain if rank else attention(SDPBackend.FLASH_ATTENTION), team).mode]
    try:
        look_together(REPLAY, plain if rank else attention(SDPBackend.FLASH_ATTENTION), team)
    except ValueError as error:
        found.append(str(error))
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.slow
def test_processes_whose_graphs_differ_see_their_losses_in_one_way(tmp_path: Path) -> None:
    first, second = together(of_two_kinds, tmp_path)

    assert first == second and first[0] == "replay" and "not even in a replay" in first[1]
