"""`NTKMonitor`: the tangent kernel of the user's own model, in the user's own training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_lowrank import Monitor, NTKMonitor
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.monitors.tangent_kernel.source import TangentKernel
from lightning_lowrank.watching.trainer import TrainerTraining
from tests.processes import together
from tests.sharded import Sharded
from tests.sharded import trained as trained_sharded
from tests.trainings import Adversaries, Classifier, ImageNet, MemoryLogger, digits

SILENT: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Ordered(Classifier):
    """Sees the digits in order, by gradient descent, and keeps what it was before each step."""

    def __init__(self, net: nn.Module | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(
            net or nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10)),
            optimizer="sgd",
            **({"lr": 0.1} | options),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(digits(), batch_size=16)


def watched(module: L.LightningModule, monitor: Monitor, **options: Any) -> MemoryLogger:
    logger = MemoryLogger()
    torch.manual_seed(0)
    L.Trainer(**(SILENT | {"max_steps": 3, "logger": logger} | options), callbacks=[monitor]).fit(module)
    return logger


def trace_of(module: Classifier, num: int, only: str = "") -> float:
    """Of the kernel of the first digits, by `torch.func`, in eval mode."""
    net = module.net.eval()
    named = {name: p.detach() for name, p in net.named_parameters() if name.startswith(only)}
    found = jacrev(lambda named: functional_call(net, named, (digits().tensors[0][:num],)))(named)
    return sum(part.square().sum().item() for part in found.values())


@pytest.mark.parametrize("net", [None, ImageNet], ids=["perceptron", "batch norm and dropout"])
def test_the_kernel_is_that_of_the_model_after_the_step(net: Callable[[], nn.Module] | None) -> None:
    module = Ordered(net and net())
    logger = watched(module, NTKMonitor(num_examples=4, every_n_steps=1, detail="all"))

    assert logger.curve("lowrank/ntk_exact") == {0: 1.0, 1: 1.0, 2: 1.0}
    assert logger.curve("ntk/trace")[2] == pytest.approx(trace_of(module, 4), rel=1e-5)


def test_match_restricts_the_kernel_to_some_parameters() -> None:
    module = Ordered()
    logger = watched(module, NTKMonitor("net.0.*", num_examples=4, every_n_steps=1, per_site=True, detail="all"))

    assert logger.curve("ntk/trace")[2] == pytest.approx(trace_of(module, 4, "0."), rel=1e-5)
    assert {tag for tag in logger.curves() if tag.startswith("ntk_layer_share/")} == {
        "ntk_layer_share/net.0.weight",
        "ntk_layer_share/net.0.bias",
    }


@pytest.mark.parametrize("kernel", ["full", "class_summed", "sum_of_logits"])
def test_the_kernel_of_a_linear_model_stays(kernel: Any) -> None:
    logger = watched(
        Ordered(nn.Sequential(nn.Linear(64, 10))),
        NTKMonitor(kernel=kernel, num_examples=4, every_n_steps=1, top_k=1, detail="all"),
    )

    moved = [
        value for tag in ("ntk/velocity", "ntk/distance_to_start") for step, value in logger.curve(tag).items() if step
    ]
    assert moved == pytest.approx([0.0] * 4, abs=1e-5)
    trace = logger.curve("ntk/trace")
    assert trace[2] == pytest.approx(trace[0], rel=1e-5)


class Sequences(L.LightningModule):
    """A small transformer, by torch's fused attention, that says the next of 12 letters; every third position does not
    count.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)
        self.layer = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
        )
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        letters = batch[0]
        targets = letters[:, 1:].clone()
        targets[:, ::3] = -100
        loss = F.cross_entropy(self.head(self.layer(self.embedding(letters[:, :-1]))).transpose(1, 2), targets)
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        letters = torch.randint(12, (16, 10), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(letters), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_positions_of_sequences_are_rows_and_ignored_ones_are_left_out() -> None:
    logger = watched(Sequences(), NTKMonitor(kernel="full", num_examples=2, every_n_steps=1, detail="all"))

    assert set(logger.curve("lowrank/ntk_rows").values()) == {2.0 * 6}
    assert all(value > 1 for value in logger.curve("ntk/participation_ratio").values())


def test_without_gradient_descent_nothing_is_said_of_what_is_learnt() -> None:
    logger = watched(Sequences(), NTKMonitor(kernel="full", num_examples=2, every_n_steps=1, detail="all"), max_steps=1)

    assert "ntk/velocity" in logger.tags()
    assert not [tag for tag in logger.tags() if "modes_learnt" in tag or "time_constant" in tag]


def test_learnt_modes_are_counted_by_the_rate_and_the_steps_so_far() -> None:
    curves = watched(Ordered(lr=2.0), NTKMonitor(kernel="full", num_examples=4, every_n_steps=1, detail="all")).curves()

    largest, constant = curves["ntk/gauss_newton_lambda_max"], curves["ntk/time_constant"]
    assert constant == pytest.approx({step: 1 / (2.0 * value) for step, value in largest.items()}, rel=1e-5)
    assert all((count >= 1) == (step + 1 >= constant[step]) for step, count in curves["ntk/modes_learnt"].items())


class Unusual(Ordered):
    """A loss that is none of torch's."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - F.one_hot(batch[1], 10)).abs().pow(1.5).mean()


def test_naming_the_output_module_gives_the_kernel_and_no_labels() -> None:
    module = Unusual()
    logger = watched(module, NTKMonitor(num_examples=4, every_n_steps=1, output_module="net", detail="all"))

    assert logger.curve("ntk/trace")[2] == pytest.approx(trace_of(module, 4), rel=1e-5)
    assert logger.curve("ntk/gauss_newton_trace")[2] > 0
    assert all(value != value for value in logger.curve("ntk/label_alignment").values())


def test_a_loss_that_is_not_known_is_no_number_and_said_once() -> None:
    with pytest.warns(UserWarning, match="output_module"):
        logger = watched(Unusual(), NTKMonitor(num_examples=4, every_n_steps=1, detail="all"))

    assert all(value != value for value in logger.curve("ntk/trace").values())


def test_in_train_mode_batch_normalisation_couples_examples_and_it_is_flagged() -> None:
    curves = [
        watched(
            Ordered(ImageNet()), NTKMonitor(num_examples=4, every_n_steps=1, train_mode=mode, detail="all"), max_steps=1
        ).curves()
        for mode in (False, True)
    ]

    assert [set(curve["lowrank/ntk_train_mode"].values()) for curve in curves] == [{0.0}, {1.0}]
    assert curves[0]["ntk/trace"][0] != pytest.approx(curves[1]["ntk/trace"][0], rel=1e-2)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
}


def test_half_precision_changes_the_kernel_by_its_rounding() -> None:
    curves = [
        watched(Ordered(), NTKMonitor(num_examples=4, every_n_steps=1, detail="all"), **OPTIONS[name]).curves()
        for name in ("plain", "bf16")
    ]

    for tag in ("ntk/trace", "ntk/lambda_max", "ntk/gauss_newton_trace"):
        assert curves[1][tag] == pytest.approx(curves[0][tag], rel=3e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 1}, "num_examples=1 must be a whole number of at least 2"),
        ({"num_projections": 3}, "num_projections=3 must be a whole number of at least 4"),
        ({"top_k": 0}, "top_k=0 must be a whole number from 1"),
        ({"num_outputs": 0}, "num_outputs=0 must be a whole number of at least 1"),
        ({"every_n_steps": 10, "max_overhead": 0.01}, "give only one"),
    ],
)
def test_a_wrong_option_is_refused_with_what_would_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NTKMonitor(**options, detail="all")


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Classifier, {"match": "nets.*"}, r"'nets\.\*' matches nothing.*net\.0\.weight"),
        (Classifier, {"output_module": "head"}, r"output_module='head' is not a layer.*net\.0"),
        (Adversaries, {}, r"manual optimization.*loss_fn"),
    ],
)
def test_what_cannot_be_seen_is_refused_before_training(
    module: Callable[[], Any], options: dict[str, Any], message: str
) -> None:
    made = module()

    with pytest.raises(ValueError, match=message):
        watched(made, NTKMonitor(**options, detail="all"))
    assert made.losses == []


class InTrainer(TrainerTraining):
    team = Team(0, 2)


def planned(module: L.LightningModule, **options: Any) -> None:
    """As before the first step of two processes."""
    training = InTrainer(L.Trainer(**SILENT, accelerator="cpu", logger=False), module)
    TangentKernel(**options).plan(training)


def test_synchronised_batch_normalisation_as_in_training_is_refused() -> None:
    planned(Classifier(nn.Sequential(nn.Linear(64, 10), nn.SyncBatchNorm(10))))

    with pytest.raises(ValueError, match=r"'net\.1': .* SyncBatchNorm has no second derivative; use train_mode=False"):
        planned(Classifier(nn.Sequential(nn.Linear(64, 10), nn.SyncBatchNorm(10))), train_mode=True)


def sharded(rank: int, size: int, root: Path) -> str:
    strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False)
    try:
        trained_sharded(Sharded(), NTKMonitor(detail="all"), MemoryLogger(), root, strategy=strategy, devices=size)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_sharded_parameters_are_refused_with_what_to_do(tmp_path: Path) -> None:
    for message in together(sharded, tmp_path):
        assert (
            "'net." in message and "is sharded" in message and "train with strategy='ddp' or on one device" in message
        )


LETTERS = 6


class HuggingFace(L.LightningModule):
    """A small GPT-2 with the loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = {"n_positions": 10, "n_embd": 8, "n_layer": 1, "n_head": 2}
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=LETTERS, bos_token_id=0, eos_token_id=0, **shape))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[0]).loss
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        letters = torch.randint(LETTERS, (16, 10), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(letters), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_a_hugging_face_model_shows_the_kernel_of_the_positions_in_its_own_loss() -> None:
    module = HuggingFace()
    logger = watched(module, NTKMonitor(kernel="full", num_examples=2, every_n_steps=1, detail="all"))
    letters = next(iter(module.train_dataloader()))[0][:2]
    net, named = module.model.eval(), {name: p.detach() for name, p in module.model.named_parameters()}

    def logits(named: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(net, named, (letters,)).logits[:, :-1]
        return found

    # Forward mode is not there for fused attention.
    with sdpa_kernel(SDPBackend.MATH):
        truth = sum(part.square().sum().item() for part in jacrev(logits)(named).values())
    assert set(logger.curve("lowrank/ntk_rows").values()) == {18.0}
    assert logger.curve("lowrank/ntk_exact")[2] == 1.0
    assert logger.curve("ntk/trace")[2] == pytest.approx(truth, rel=1e-4)


def test_a_loss_function_takes_the_place_of_a_step_that_cannot_be_run_again() -> None:
    def critic(module: Any, batch: Any) -> Tensor:
        return F.mse_loss(module.critic(batch[0]), batch[0].mean(1, keepdim=True))

    logger = watched(
        Adversaries(), NTKMonitor("critic.*", num_examples=4, every_n_steps=1, loss_fn=critic, detail="all")
    )

    assert all(value > 0 for value in logger.curve("ntk/trace").values())


@pytest.mark.parametrize("num", [4, 13], ids=["exact", "estimated"])
def test_a_run_that_is_resumed_goes_on_with_the_same_batch_and_start(num: int, tmp_path: Path) -> None:
    def monitor() -> Monitor:
        return NTKMonitor(kernel="full", num_examples=num, every_n_steps=2, per_site=True, detail="all")

    whole = watched(Ordered(), monitor(), max_steps=-1, max_epochs=2).curves()
    trainer = L.Trainer(**SILENT, logger=False, max_epochs=1, callbacks=[monitor()])
    trainer.fit(Ordered())
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    logger = MemoryLogger()
    resumed = L.Trainer(**SILENT, logger=logger, max_epochs=2, callbacks=[monitor()])
    resumed.fit(Ordered(), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)

    for tag in ("ntk/velocity", "ntk/distance_to_start", "ntk/trace", "ntk_layer_velocity/net.0.weight"):
        assert logger.curve(tag) == pytest.approx({step: whole[tag][step] for step in (4, 6)}, rel=1e-3, abs=1e-9)


class Wrapped(Ordered):
    """Batches are objects of its own."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"all": frozenset(), "parts": batch}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["parts"], batch_idx)


def test_a_batch_that_a_checkpoint_cannot_hold_is_not_in_it() -> None:
    monitor = NTKMonitor(num_examples=4, every_n_steps=1, detail="all")
    watched(Wrapped(), monitor)

    assert monitor.state_dict()["probes"]["ntk"]["source"] == {}


def test_another_run_begins_anew() -> None:
    monitor = NTKMonitor(num_examples=4, every_n_steps=1, detail="all")
    first, second = (watched(Ordered(), monitor).curves() for _ in range(2))

    assert second["ntk/distance_to_start"] == pytest.approx(first["ntk/distance_to_start"], nan_ok=True)


def test_tags_are_in_the_event_file(tmp_path: Path) -> None:
    watched(
        Ordered(),
        NTKMonitor(num_examples=4, every_n_steps=1, per_site=True, detail="all"),
        logger=TensorBoardLogger(tmp_path),
    )

    (file,) = tmp_path.rglob("events.*")
    tags = set(EventAccumulator(str(file)).Reload().Tags()["scalars"])
    names = (
        "trace",
        "lambda_max",
        "lambda_2",
        "participation_ratio",
        "effective_rank_energy",
        "energy_rank",
        "condition",
    )
    names += (
        "label_alignment",
        "centred_label_alignment",
        "velocity",
        "distance_to_start",
        "modes_learnt",
        "label_energy_in_top",
    )
    sites = ("layer_share/net.0.weight", "layer_velocity/net.2.bias")
    assert {f"ntk/{name}" for name in (*names, "velocity_error", "gauss_newton_trace")} <= tags
    assert {f"ntk_{site}" for site in sites} <= tags


class InParts(Ordered):
    """Sees 16 digits a step, on one process or on two together."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def train_dataloader(self) -> DataLoader[Any]:
        # The sampler that Lightning would put here shuffles.
        sampler = DistributedSampler(digits(), self.size, self.rank, shuffle=False)
        return DataLoader(digits(), batch_size=16 // self.size, sampler=sampler)


class FailingOnOne(InParts):
    """One process cannot run its step again."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.rank == 1 and not self.training:
            raise RuntimeError("not here")
        return super().training_step(batch, batch_idx)


def in_parallel(rank: int, size: int, root: Path) -> dict[str, Any]:
    """Curves, weights and failures, of exact and of estimated kernels, watched and not."""
    found: dict[str, Any] = {}
    cases: dict[str, tuple[type[InParts], Any]] = {
        "exact": (InParts, {"kernel": "sum_of_logits"}),
        "estimated": (InParts, {"kernel": "full", "num_projections": 64}),
        "unwatched": (InParts, None),
    }
    cases |= {"failing": (FailingOnOne, {})} if size > 1 else {}
    for case, (make, asked) in cases.items():
        module, logger = make(rank, size), MemoryLogger()
        monitor = (
            None
            if asked is None
            else NTKMonitor(num_examples=16 // size, every_n_steps=1, per_site=True, **asked, detail="all")
        )
        options: dict[str, Any] = {"use_distributed_sampler": False, "accelerator": "cpu", "max_epochs": 1}
        options |= {"devices": size, "strategy": DDPStrategy()} if size > 1 else {}
        L.Trainer(**SILENT, **options, logger=logger, callbacks=[monitor] if monitor else []).fit(module)
        weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        found[case] = logger.curves(), weights, monitor and monitor.failures
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:lightning_lowrank")
def test_two_processes_find_the_kernel_of_their_whole_batch_and_train_as_unwatched(tmp_path: Path) -> None:
    first, second = together(in_parallel, tmp_path)
    alone = in_parallel(0, 1, tmp_path)

    assert [parts[case][2] for parts in (first, second) for case in ("exact", "estimated")] == [0] * 4
    for case in ("exact", "estimated", "failing"):
        torch.testing.assert_close(first[case][1], first["unwatched"][1], rtol=0, atol=0)
    for tag in (
        "ntk/trace",
        "ntk/lambda_max",
        "ntk/label_alignment",
        "ntk/gauss_newton_lambda_max",
        "ntk_layer_share/net.0.weight",
    ):
        # The rows are in another order, so that estimates are of other vectors.
        torch.testing.assert_close(
            first["exact"][0][tag], alone["exact"][0][tag], rtol=1e-3 if "layer" not in tag else 0.5, atol=1e-5
        )
        torch.testing.assert_close(first["estimated"][0][tag], alone["estimated"][0][tag], rtol=0.3, atol=1e-3)
    assert first["failing"][2] > 0 and all(value != value for value in first["failing"][0]["ntk/trace"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": True}, "num_examples=True.*an integer"),
        ({"top_k": True}, "top_k=True.*an integer"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"seed": 2**40}, "seed=1099511627776 must be a whole number from 0"),
    ],
)
def test_what_would_lose_every_sample_is_refused_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NTKMonitor(**options, detail="all")


class Waves(nn.Module):
    """A complex layer before a real one."""

    def __init__(self) -> None:
        super().__init__()
        self.complex = nn.Parameter(torch.ones(6, 64, dtype=torch.complex64) / 8)
        self.real = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.real((x.to(self.complex) @ self.complex.mT).abs())


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (Waves, {}, r"'net\.complex' is complex.*exclude"),
        (None, {"match": []}, r"match=\[\].*leaves no parameter"),
        (None, {"exclude": "*"}, r"exclude='\*' leaves no parameter"),
    ],
)
def test_parameters_without_a_kernel_are_refused_before_training(
    net: Any, options: dict[str, Any], message: str
) -> None:
    module = Ordered(net and net())

    with pytest.raises(ValueError, match=message):
        watched(module, NTKMonitor(**options, detail="all"))
    assert module.losses == []


def test_real_parameters_beside_complex_ones_have_their_kernel() -> None:
    module = Ordered(Waves())
    logger = watched(module, NTKMonitor(exclude="*complex", num_examples=4, every_n_steps=1, detail="all"))

    assert logger.curve("ntk/trace")[2] == pytest.approx(trace_of(module, 4, "real"), rel=1e-5)


class InTurn(L.Callback):
    """One layer is trained, or the other."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for layer, turn in ((pl_module.net[0], 0), (pl_module.net[2], 1)):
            layer.requires_grad_(trainer.global_step % 2 == turn)


@pytest.mark.filterwarnings("ignore:.*no number for 2 of")
def test_kernels_of_different_parameters_are_not_compared() -> None:
    logger, monitor = MemoryLogger(), NTKMonitor(num_examples=4, every_n_steps=1, detail="all")
    L.Trainer(**SILENT, max_steps=4, logger=logger, callbacks=[InTurn(), monitor]).fit(Ordered())

    assert all(
        value != value for tag in ("ntk/velocity", "ntk/distance_to_start") for value in logger.curve(tag).values()
    )


class TwoOptimizers(Ordered):
    """Gradient descent on both layers, each by an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__(lr=2.0)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=2.0) for i in (0, 2)]


def test_steps_of_several_optimizers_are_the_same_time() -> None:
    options: dict[str, Any] = {"kernel": "full", "num_examples": 4, "every_n_steps": 1}
    options["loss_fn"] = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])
    one, two = (
        watched(module, NTKMonitor(**options, detail="all"), max_steps=6 * num)
        for module, num in ((Ordered(lr=2.0), 1), (TwoOptimizers(), 2))
    )

    found = one.curve("ntk/modes_learnt")
    assert list(two.curve("ntk/modes_learnt").values())[:6] == pytest.approx(list(found.values()))
    assert max(found.values()) > min(found.values())


@pytest.mark.filterwarnings("ignore:.*returned .None")
def test_a_first_batch_without_a_kernel_is_not_kept() -> None:
    class Warming(Ordered):
        """Has no loss at first: a step without any gradient is no sample."""

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx else None

    with pytest.warns(UserWarning, match="no number"):
        logger = watched(Warming(), NTKMonitor(num_examples=4, every_n_steps=1, detail="all"))

    assert [value == value for value in logger.curve("ntk/gauss_newton_trace").values()] == [False, True]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.filterwarnings("ignore:.*ended before the epoch ended")
@pytest.mark.parametrize(
    "options", [{"num_examples": 6}, {"kernel": "sum_of_logits"}, {"train_mode": True}], ids=lambda o: next(iter(o))
)
def test_a_run_that_is_resumed_with_other_options_begins_anew(options: dict[str, Any], tmp_path: Path) -> None:
    def run(steps: int, path: Path | None, **options: Any) -> MemoryLogger:
        logger, monitor = (
            MemoryLogger(),
            NTKMonitor(**({"num_examples": 4, "every_n_steps": 1} | options), detail="all"),
        )
        trainer = L.Trainer(**SILENT, max_steps=steps, logger=logger, callbacks=[monitor])
        trainer.fit(Ordered(ImageNet()), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        return logger

    run(2, None)
    resumed = run(4, tmp_path / "run.ckpt", **options)

    assert [value == value for value in resumed.curve("ntk/distance_to_start").values()] == [False, True]


def test_the_batch_of_the_step_is_let_go_of_after_the_sample() -> None:
    class Looking(L.Callback):
        """Whether the source still has it."""

        held: Any = True

        def on_train_batch_end(self, *_: Any) -> None:
            self.held = source._batch

    monitor, looking = NTKMonitor(num_examples=4, every_n_steps=1, detail="all"), Looking()
    source: Any = monitor.recorders[0].probe.source
    L.Trainer(**SILENT, max_steps=1, logger=False, callbacks=[monitor, looking]).fit(Ordered())

    assert looking.held is None
