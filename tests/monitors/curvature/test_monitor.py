"""`CurvatureMonitor`: the curvature of the user's own loss, in the user's own training."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_lowrank import Alert, CurvatureMonitor, Monitor
from tests.curvatures import FullBatch, watched
from tests.processes import together
from tests.trainings import CASES, COMPILED, LOSSES, Classifier, ImageNet, MemoryLogger, digits, trained, unwatched

FISHERS = ("empirical_fisher", "monte_carlo_fisher")


def dense(module: FullBatch, at: list[Tensor]) -> Tensor:
    """The Hessian of the loss on all digits, by torch's own, in float64."""
    images, labels = digits().tensors
    names, shapes = zip(*((name, p.shape) for name, p in module.net.named_parameters()), strict=True)

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(module.net.double(), weights, images.double()), labels)

    return torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in at]).double())


def test_the_top_of_the_spectrum_is_that_of_the_dense_hessian() -> None:
    module = FullBatch()

    logger = watched(module, CurvatureMonitor("full", ["hessian"], top_k=3, every_n_steps=1, detail="all"))

    for step, at in enumerate(module.seen):
        values = torch.linalg.eigvalsh(dense(module, at))
        assert logger.curve("curvature/hessian_lambda_max")[step] == pytest.approx(values[-1].item(), rel=1e-4)
        assert logger.curve("curvature/hessian_lambda_3")[step] == pytest.approx(values[-3].item(), rel=1e-3)
        assert logger.curve("curvature/hessian_lambda_min")[step] == pytest.approx(values[0].item(), rel=1e-2)


def test_sums_over_the_spectrum_are_within_their_errors() -> None:
    module = FullBatch()

    logger = watched(
        module, CurvatureMonitor("full", ["hessian"], top_k=3, every_n_steps=1, detail="all"), max_epochs=8
    )

    trace, error = logger.curve("curvature/hessian_trace"), logger.curve("curvature/hessian_trace_error")
    off = [abs(trace[step] - dense(module, at).trace().item()) / error[step] for step, at in enumerate(module.seen)]
    assert sorted(off)[len(off) // 2] < 2
    assert all(0 < error[step] < 2 * trace[step] for step in trace)


def test_batch_sharpness_of_gradient_descent_is_held_against_two_over_the_learning_rate() -> None:
    logger = watched(FullBatch(), CurvatureMonitor(every_n_steps=1, detail="all"))

    sharpness, over = (
        logger.curve("curvature/batch_sharpness"),
        logger.curve("curvature/batch_sharpness_over_threshold"),
    )
    assert all(over[step] == pytest.approx(sharpness[step] * 0.1 / 2, rel=1e-5) for step in sharpness)


def test_the_edge_of_gradient_descent_is_where_the_largest_eigenvalue_says() -> None:
    logger = watched(FullBatch(), CurvatureMonitor("standard", ["hessian"], every_n_steps=1, detail="all"))

    largest, over = logger.curve("curvature/hessian_lambda_max"), logger.curve("curvature/sharpness_over_threshold")
    assert all(over[step] == pytest.approx(largest[step] * 0.1 / 2, rel=2e-2) for step in largest)


def test_a_linear_model_has_one_curvature_by_three_names() -> None:
    """Hessian and Gauss-Newton matrix are the same there, and the Monte Carlo Fisher is them on average."""
    module = FullBatch(nn.Sequential(nn.Linear(64, 10)))

    logger = watched(
        module,
        CurvatureMonitor("standard", ["hessian", "gauss_newton", *FISHERS], every_n_steps=1, detail="all"),
        max_epochs=6,
    )

    hessian, other = logger.curve("curvature/hessian_lambda_max"), logger.curve("curvature/gauss_newton_lambda_max")
    assert all(other[step] == pytest.approx(hessian[step], rel=1e-3) for step in hessian)
    drawn = logger.curve("curvature/monte_carlo_fisher_trace")
    exact = [dense(module, at).trace().item() for at in module.seen]
    assert sum(drawn.values()) == pytest.approx(sum(exact), rel=0.25)


@pytest.mark.parametrize("batch", ["live", "fixed"])
def test_critical_sharpness_on_full_batches_is_a_curvature_along_the_update(batch: Any) -> None:
    logger = watched(
        FullBatch(lr=0.001), CurvatureMonitor("standard", [], batch=batch, every_n_steps=1, detail="all"), max_epochs=6
    )

    assert list(logger.curves()["curvature/critical_sharpness"]) == list(range(6))
    assert all(0 < value < 40 for step, value in logger.curve("curvature/critical_sharpness").items() if step > 1)


def test_a_replay_sees_the_same_curvature_as_the_live_graph() -> None:
    live = watched(FullBatch(), CurvatureMonitor(every_n_steps=1, detail="all"))
    replayed = watched(FullBatch(), CurvatureMonitor(batch="fixed", every_n_steps=1, detail="all"))

    # A replay comes after the step, the live graph before it.
    ahead = [live.curve("curvature/batch_sharpness")[step + 1] for step in range(2)]
    torch.testing.assert_close(
        [replayed.curve("curvature/batch_sharpness")[step] for step in range(2)], ahead, rtol=1e-4, atol=0
    )


class Attention(nn.Module):
    """One head, by torch's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.reshape(-1, 1, 8, 8)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10)),
    "batch norm and dropout": ImageNet,
    "fused attention": Attention,
    "layer norm": lambda: nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 10)),
}


def test_fused_attention_is_replayed_and_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    logger = watched(Classifier(Attention()), CurvatureMonitor(every_n_steps=2, detail="all"))

    assert set(logger.curve("lowrank/curvature_replayed").values()) == {1.0}
    assert all(value == value for value in logger.curve("curvature/batch_sharpness").values())


class Unusual(Classifier):
    """A loss that is none of torch's."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - F.one_hot(batch[1], 10)).abs().pow(1.5).mean()


def test_a_loss_that_is_not_known_costs_gauss_newton_and_not_the_hessian() -> None:
    with pytest.warns(UserWarning, match="output_module"):
        logger = watched(Unusual(), CurvatureMonitor("standard", top_k=2, every_n_steps=2, detail="all"))

    assert all(value == value for value in logger.curve("curvature/hessian_lambda_max").values())
    assert all(value != value for value in logger.curve("curvature/gauss_newton_lambda_max").values())


def test_naming_the_output_module_gives_gauss_newton() -> None:
    logger = watched(
        Unusual(), CurvatureMonitor("standard", top_k=2, every_n_steps=2, output_module="net", detail="all")
    )

    assert all(value > 0 for value in logger.curve("curvature/gauss_newton_lambda_max").values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operators": ["hesian"]}, "gauss_newton"),
        ({"operators": "hessian"}, "a sequence"),
        ({"operators": ["gauss_newton"]}, "level='standard'"),
        ({"top_k": 0}, "from 1 to 100"),
    ],
)
def test_a_wrong_option_is_refused_with_what_would_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CurvatureMonitor(**options, detail="all")


class InParts(Classifier):
    """Sees 16 digits a step, on one process or on two together."""

    def __init__(self, rank: int, size: int, net: nn.Module) -> None:
        super().__init__(net, optimizer="sgd", lr=0.1)
        self.rank, self.size = rank, size

    def train_dataloader(self) -> DataLoader[Any]:
        # The sampler that Lightning would put here shuffles.
        sampler = DistributedSampler(digits(), self.size, self.rank, shuffle=False)
        return DataLoader(digits(), batch_size=16 // self.size, sampler=sampler)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "plain": DDPStrategy,
    "static graph": lambda: DDPStrategy(static_graph=True),
}


def in_parallel(rank: int, size: int, root: Path) -> dict[str, Any]:
    """Curves, weights and failures, with and without a monitor."""
    found: dict[str, Any] = {}
    for model in ("layer norm", "fused attention"):
        for strategy, make in STRATEGIES.items():
            for is_watched in (True, False):
                torch.manual_seed(0)
                module, logger = InParts(rank, size, MODELS[model]()), MemoryLogger()
                # A static graph is replayed, from the first batch.
                monitor = CurvatureMonitor(
                    "standard", top_k=2, every_n_steps=1, batch="live" if strategy == "plain" else "fixed", detail="all"
                )
                options: dict[str, Any] = {
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "enable_checkpointing": False,
                }
                options |= {"use_distributed_sampler": False, "accelerator": "cpu", "max_epochs": 1}
                options |= {"devices": size, "strategy": make()} if size > 1 else {}
                L.Trainer(**options, logger=logger, callbacks=[monitor] if is_watched else []).fit(module)
                weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
                found[f"{model}, {strategy}, {is_watched}"] = (logger.curves(), weights, monitor.failures)
    return found


@pytest.mark.slow
def test_two_processes_find_the_curvature_of_their_whole_batch_and_train_as_unwatched(tmp_path: Path) -> None:
    first, second = together(in_parallel, tmp_path)
    alone = in_parallel(0, 1, tmp_path)

    for case in (f"{model}, {strategy}" for model in ("layer norm", "fused attention") for strategy in STRATEGIES):
        curves, weights, failures = first[f"{case}, True"]
        assert failures == second[f"{case}, True"][2] == 0
        torch.testing.assert_close(weights, first[f"{case}, False"][1], rtol=0, atol=0)
        for tag in ("curvature/batch_sharpness", "curvature/hessian_lambda_max", "curvature/gauss_newton_lambda_max"):
            torch.testing.assert_close(curves[tag], alone[f"{case}, True"][0][tag], rtol=2e-2, atol=1e-3)


def test_the_residual_is_what_the_hessian_has_beside_the_gauss_newton_matrix() -> None:
    module = FullBatch()

    logger = watched(module, CurvatureMonitor("full", top_k=3, every_n_steps=1, detail="all"), max_epochs=8)

    rest, error = logger.curve("curvature/residual_trace"), logger.curve("curvature/residual_trace_error")
    other = {
        step: trace - logger.curve("curvature/gauss_newton_trace")[step]
        for step, trace in logger.curve("curvature/hessian_trace").items()
    }
    assert sorted(abs(rest[step] - other[step]) / error[step] for step in rest)[len(rest) // 2] < 3
    assert all(value > 0 for value in logger.curve("curvature/residual_squared_norm").values())


def test_a_linear_model_has_no_residual() -> None:
    logger = watched(
        FullBatch(nn.Sequential(nn.Linear(64, 10))), CurvatureMonitor("standard", every_n_steps=1, detail="all")
    )

    squares, whole = logger.curve("curvature/residual_squared_norm"), logger.curve("curvature/hessian_squared_norm")
    assert all(squares[step] < 1e-8 * whole[step] for step in squares)


class Tops(L.Callback):
    """What was steepest after each step."""

    def __init__(self, monitor: Monitor) -> None:
        self.source: Any = monitor.recorders[0].probe.source
        self.found: list[Tensor] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append(self.source.state.tops["hessian"].clone())


def test_the_way_from_the_start_is_held_against_the_directions_of_the_last_sample() -> None:
    module, monitor = FullBatch(), CurvatureMonitor("standard", ["hessian"], top_k=3, every_n_steps=1, detail="all")
    tops = Tops(monitor)
    logger = MemoryLogger()
    trainer = L.Trainer(
        max_epochs=4, logger=logger, callbacks=[monitor, tops], enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(module)

    places = [torch.cat([p.flatten() for p in at]) for at in [*module.seen, [p.detach() for p in module.parameters()]]]
    # Before the step, as `displacement` is.
    for step in range(1, 4):
        way = places[step] - places[0]
        expected = (tops.found[step - 1] @ way).square().sum() / way.square().sum()
        assert logger.curve("curvature/displacement_in_top")[step] == pytest.approx(expected.item(), rel=1e-4)


class Detached(torch.autograd.Function):
    """The square, whose derivative hides what it depends on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2 * ctx.saved_tensors[0].detach()


class Hiding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        squared: Tensor = Detached.apply(x)
        return squared


def test_a_layer_whose_second_derivative_is_wrong_makes_curvature_invalid() -> None:
    net = nn.Sequential(nn.Linear(64, 6), Hiding(), nn.Linear(6, 10))

    with pytest.warns(UserWarning, match="curvature_valid at the whole model since step 0: 0, alert"):
        logger = watched(FullBatch(net, lr=0.01), CurvatureMonitor(every_n_steps=1, detail="all"))

    assert set(logger.curve("curvature/valid").values()) == {0.0}
    assert all(value != value for value in logger.curve("curvature/batch_sharpness").values())
    assert logger.curve("curvature/difference_defect")[0] > 0.05


def test_the_density_of_the_eigenvalues_is_a_histogram_in_tensorboard(tmp_path: Path) -> None:
    module = FullBatch()
    monitor = CurvatureMonitor("full", ["hessian"], top_k=3, every_n_steps=1, detail="all")
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "max_epochs": 2}

    L.Trainer(**options, logger=TensorBoardLogger(tmp_path, name="", version=""), callbacks=[monitor]).fit(module)

    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    found = events.Histograms("hessian_density_counts")
    assert [event.step for event in found] == [0, 1]
    for event, at in zip(found, module.seen, strict=True):
        values = torch.linalg.eigvalsh(dense(module, at))
        assert sum(event.histogram_value.bucket) == pytest.approx(len(values), rel=0.05)
        assert event.histogram_value.min < values[0] and event.histogram_value.max > values[-1]


def test_the_rank_of_the_hessian_is_that_of_the_dense_one() -> None:
    """Where eigenvalues are negative as well as positive: two steps would give the square of the trace over the sum of
    squares.
    """
    module = FullBatch(lr=1.0)

    logger = watched(
        module, CurvatureMonitor("full", ["hessian"], top_k=3, every_n_steps=1, detail="all"), max_epochs=8
    )

    found, error = (
        logger.curve("curvature/hessian_participation_ratio"),
        logger.curve("curvature/hessian_participation_ratio_error"),
    )
    off = []
    for step, at in enumerate(module.seen):
        values = torch.linalg.eigvalsh(dense(module, at))
        exact = (values.abs().sum().square() / values.square().sum()).item()
        assert found[step] == pytest.approx(exact, rel=0.3)
        off.append(abs(found[step] - exact) / error[step])
    assert sorted(off)[len(off) // 2] < 3


def test_two_steps_say_nothing_of_magnitudes_of_the_hessian() -> None:
    quantities = CurvatureMonitor("standard", detail="all").recorders[0].quantities

    assert "hessian_participation_ratio" not in quantities
    assert "gauss_newton_participation_ratio" in quantities


def test_an_operator_that_cannot_be_had_does_not_take_the_others_with_it() -> None:
    with pytest.warns(UserWarning, match="empirical_fisher and monte_carlo_fisher: this needs a loss of torch"):
        logger = watched(
            Unusual(),
            CurvatureMonitor(
                "standard", ["gauss_newton", *FISHERS], top_k=2, every_n_steps=2, output_module="net", detail="all"
            ),
        )

    assert all(value > 0 for value in logger.curve("curvature/gauss_newton_lambda_max").values())
    for name in FISHERS:
        assert all(value != value for value in logger.curve(f"curvature/{name}_lambda_max").values())


def test_sums_of_a_batch_that_stays_are_left_to_the_same_chance() -> None:
    logger = watched(
        FullBatch(lr=0.0),
        CurvatureMonitor("standard", ["gauss_newton"], top_k=1, batch="fixed", every_n_steps=1, detail="all"),
    )

    first, *others = logger.curve("gauss_newton_layer_trace/net.2.weight").values()
    assert others == pytest.approx([first] * len(others), rel=1e-2)


def test_an_alert_on_sites_of_a_number_of_the_whole_model_is_refused() -> None:
    with pytest.raises(ValueError, match="hessian_trace is one number of the whole model; remove sites="):
        watched(
            FullBatch(),
            CurvatureMonitor("standard", alerts=[Alert("hessian_trace", sites="net*", above=1.0)], detail="all"),
        )


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda module, batch: module(batch[0]), r"loss_fn returned a tensor of shape \(64, 10\)"),
        (lambda module, batch: module(batch[0]).mean().detach(), "a number without a gradient"),
        (lambda module, batch: None, "a NoneType"),
    ],
)
def test_what_a_loss_function_gave_instead_of_a_loss_is_said(loss_fn: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        watched(FullBatch(), CurvatureMonitor(loss_fn=loss_fn, every_n_steps=1, detail="all"))


def test_a_replay_is_in_the_cost_of_its_own_sample() -> None:
    logger = watched(
        FullBatch(),
        CurvatureMonitor("standard", ["hessian"], batch="fixed", every_n_steps=2, detail="all"),
        max_epochs=1,
    )

    (cost,) = logger.curve("lowrank/curvature_time_ms").values()
    assert cost > 20


@pytest.mark.parametrize("case", LOSSES)
def test_several_optimizers_have_the_sharpness_of_their_live_graphs_and_train_as_unwatched(
    case: str, tmp_path: Path
) -> None:
    make, options = CASES[case]
    monitor = CurvatureMonitor("light", every_n_steps=3, alerts=None, detail="all")

    found = trained(make, options(), [monitor], tmp_path)

    torch.testing.assert_close(found, unwatched(case), rtol=0, atol=0)
    # The first loss of a step: the critic's, that has a square of its weights in it.
    assert monitor.latest is not None and monitor.latest.values["batch_sharpness"][""] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("what", COMPILED)
def test_curvature_of_a_compiled_module_comes_from_a_replay(what: str, tmp_path: Path) -> None:
    monitor = CurvatureMonitor("standard", top_k=1, every_n_steps=4, detail="all")

    trained(lambda: COMPILED[what]("aot_eager"), {"max_epochs": 1}, [monitor], tmp_path)

    source: Any = monitor.recorders[0].probe.source
    assert source.facts()["replayed"] == 1.0
    assert monitor.failures == 0
    for quantity in ("batch_sharpness", "hessian_lambda_max", "hessian_trace", "gauss_newton_trace"):
        assert math.isfinite(monitor.latest.values[quantity][""]), quantity
    assert math.isfinite(monitor.latest.values["critical_sharpness"][""])
