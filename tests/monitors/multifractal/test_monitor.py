"""`MultifractalMonitor`: the multifractal statistics of weights, in real trainings."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from lightning_lowrank import Monitor, MultifractalMonitor, emergence, multifractal_spectrum, statistics
from lightning_lowrank.analysis.cli import main
from lightning_lowrank.analysis.page import reader_of
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.maths.scaling.bootstrap import FEWEST_NODES
from lightning_lowrank.maths.scaling.scaling import ORDERS
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.monitors.multifractal import network_source
from lightning_lowrank.monitors.multifractal.curves import vectors
from lightning_lowrank.monitors.multifractal.network_source import NeuroMFA
from lightning_lowrank.monitors.multifractal.source import OF_A_MATRIX, Multifractal
from lightning_lowrank.tensorboard import answers
from lightning_lowrank.watching.loops import LoopTraining
from tests.dispatch import Waits
from tests.processes import together
from tests.scalings import jittered
from tests.sharded import Sharded
from tests.sharded import trained as trained_sharded
from tests.tab import train, written
from tests.trainings import Classifier, ImageNet, InOrder, MemoryLogger, fitted, mlp

SPECTRAL = ("alpha0", "width", "c2_excess", "box_dimension", "asymmetry")


class Snapshots(L.Callback):
    """Weights as they are when a batch begins."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def watched(net: nn.Module, monitor: Monitor, *callbacks: L.Callback, **options: Any) -> MemoryLogger:
    logger = MemoryLogger()
    silent: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    L.Trainer(**(silent | options), logger=logger, callbacks=[*callbacks, monitor]).fit(Classifier(net))
    return logger


def numbers(source: Multifractal | NeuroMFA, module: nn.Module, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """What a source finds at once, by site."""
    source.plan(LoopTraining(module))
    source.batch_begins(Batch(LoopTraining(module), None, 0, seed))
    return {
        found.site: {name: float(value) for name, value in found.values.items()} for found in source.numbers(Team())
    }


@pytest.mark.parametrize("direction", ["in", "out"])
@pytest.mark.parametrize("name", OF_A_MATRIX)
def test_numbers_are_those_of_the_weights_before_the_step(name: str, direction: str) -> None:
    snapshots = Snapshots()

    logger = watched(mlp(), MultifractalMonitor(every_n_steps=3, per_site=True, detail="all"), snapshots)

    expected = [
        getattr(statistics, name)(multifractal_spectrum(w["net.2.weight"], direction=direction))
        for w in snapshots.weights[::3]
    ]
    found = logger.curve(f"multifractal_{name}/net.2.weight.{direction}")
    assert list(found) == [0, 3, 6]
    assert_close(torch.tensor(list(found.values())).double(), torch.stack(expected), equal_nan=True)


def test_what_is_identically_one_is_not_logged() -> None:
    logger = watched(mlp(), MultifractalMonitor(per_site=True, detail="all"))

    assert not [tag for tag in logger.curves() if "correlation_dimension" in tag]


def test_kernels_of_a_convolution_enter_by_their_norms() -> None:
    layer = nn.Conv2d(40, 48, (3, 2))

    found = numbers(Multifractal(), nn.Sequential(layer))

    norms = layer.weight.detach().flatten(2).norm(dim=-1)
    expected = statistics.dispersion(multifractal_spectrum(norms, direction="in"))
    assert found["0.weight.in"]["multifractal_dispersion"] == pytest.approx(float(expected))


def test_kernels_of_a_transposed_and_of_a_parametrised_convolution_enter_by_their_norms() -> None:
    swapped = nn.ConvTranspose1d(48, 40, 3)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(40, 48, 3))

    found = numbers(Multifractal(), nn.Sequential(swapped, normed))

    for i, norms in enumerate((swapped.weight.norm(dim=-1).mT, normed.weight.norm(dim=-1))):
        expected = statistics.alpha0(multifractal_spectrum(norms.detach()))
        assert found[f"{i}.weight.out"]["multifractal_alpha0"] == pytest.approx(float(expected))


def test_queries_keys_and_values_are_apart_and_heads_if_asked() -> None:
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 2)})

    plain, by_head = numbers(Multifractal(), attention), numbers(Multifractal(heads=True), attention)

    ends = [f".{part}.{direction}" for part in "qkv" for direction in ("in", "out")]
    assert [site.removeprefix("attention.in_proj_weight") for site in plain if "in_proj" in site] == sorted(
        ends, key=lambda e: e[2:]
    )
    queries = attention["attention"].in_proj_weight.detach()[:64]
    expected = statistics.width(multifractal_spectrum(queries))
    assert plain["attention.in_proj_weight.q.out"]["multifractal_width"] == pytest.approx(float(expected))
    assert "attention.in_proj_weight.q.h1.in" in by_head


ODD: dict[str, Callable[[], Tensor]] = {
    "constant": lambda: torch.ones(64, 64),
    "zero": lambda: torch.zeros(64, 64),
    "pruned": lambda: torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * (torch.arange(64) % 3 == 0),
    "fan-in below 32": lambda: torch.randn(64, 20, generator=torch.Generator().manual_seed(0)),
    "not concave": lambda: jittered(256, 256, spread=0.5).float(),
}


class Holding(nn.Module):
    """A matrix that is never trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.held, self.body = nn.Parameter(weight, requires_grad=False), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("odd", ODD)
def test_without_a_spectrum_there_is_no_number_and_no_failure(odd: str) -> None:
    monitor = MultifractalMonitor(per_site=True, detail="all")

    logger = watched(Holding(ODD[odd]()), monitor)

    assert logger.curve("multifractal_valid/net.held.in") == {0: 0.0}
    assert all(math.isnan(logger.curve(f"multifractal_{name}/net.held.in")[0]) for name in SPECTRAL)
    assert monitor.failures == 0


def test_neurons_too_different_for_a_spectrum_still_have_a_dispersion() -> None:
    logger = watched(Holding(ODD["not concave"]()), MultifractalMonitor(per_site=True, detail="all"))

    seen, chance = (logger.curve(f"multifractal_{name}/net.held.in")[0] for name in ("dispersion", "dispersion_chance"))
    assert seen > chance > 0


class Doubled(nn.Module):
    """A parametrization that fails once it is told to."""

    broken = False

    def forward(self, weight: Tensor) -> Tensor:
        if self.broken and not self.training:
            raise RuntimeError("not now")
        return 2 * weight


@pytest.mark.filterwarnings("ignore:.*no number for 2 of")
def test_a_weight_that_cannot_be_computed_costs_its_own_numbers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    net, monitor = mlp(), MultifractalMonitor(per_site=True, every_n_steps=4, detail="all")
    parametrize.register_parametrization(net[0], "weight", Doubled())

    class Break(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            monkeypatch.setattr(Doubled, "broken", True)

    logger = watched(net, monitor, Break())

    assert [
        step for step, value in logger.curve("multifractal_alpha0/net.0.weight.in").items() if math.isfinite(value)
    ] == [0]
    assert all(math.isfinite(value) for value in logger.curve("multifractal_alpha0/net.2.weight.in").values())
    assert monitor.failures == 2


def test_the_event_file_has_the_tags_that_are_promised(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    settings: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    monitors = [
        MultifractalMonitor(every_n_steps=2, per_site=True, detail="all"),
        MultifractalMonitor("neuromfa", every_n_steps=4, detail="all"),
    ]

    L.Trainer(max_epochs=1, logger=logger, callbacks=[*monitors], **settings).fit(Classifier(mlp()))

    curves = EventAccumulator(logger.log_dir).Reload()
    for name in OF_A_MATRIX:
        for tag in (f"multifractal_{name}/net.0.weight.in", f"multifractal/{name}_median"):
            assert [event.step for event in curves.Scalars(tag)] == [0, 2, 4, 6]
    for name in (
        "alpha0",
        "width",
        "emergence",
        "alpha0_shuffled",
        "width_gaussian",
        "emergence_shuffled",
        "kept_share",
    ):
        assert [event.step for event in curves.Scalars(f"neuromfa/{name}")] == [0, 4]
    assert curves.Scalars("multifractal_valid/net.0.weight.in")[0].value == 1


def test_spectra_are_written_for_the_tab(tmp_path: Path) -> None:
    snapshots = Snapshots()
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    settings: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    monitors = [
        MultifractalMonitor(every_n_steps=4, detail="all"),
        MultifractalMonitor("neuromfa", every_n_steps=4, detail="all"),
    ]

    L.Trainer(max_epochs=1, logger=logger, callbacks=[*monitors, snapshots], **settings).fit(Classifier(mlp()))

    found, known = written(tmp_path / "run")
    weights = [snapshots.weights[4][f"net.{i}.weight"] for i in (0, 2, 4)]
    of_layer, of_model = multifractal_spectrum(weights[1], direction="in"), multifractal_spectrum(weights, "neuromfa")
    sites = known["lowrank_curve/multifractal_f"]["sites"]
    for name in ("tau", "alpha", "f", "dimensions"):
        row = found[f"lowrank_curve/multifractal_{name}"][4]
        assert_close(
            torch.tensor(row[sites.index("net.2.weight.in")]).double(),
            getattr(of_layer, name)[::2],
            rtol=1e-5,
            atol=1e-5,
        )
        assert (
            row[sites.index("net.4.weight.out")].max() != row[sites.index("net.4.weight.out")].max()
        )  # fan-out of 10: no spectrum
        model = torch.tensor(found[f"lowrank_curve/neuromfa_{name}"][4][0]).double()
        assert_close(model, getattr(of_model, name)[::2], rtol=1e-5, atol=1e-5)
    assert known["lowrank_curve/neuromfa_f"]["axis"] == pytest.approx([q / 5 for q in range(-15, 16)])


def test_partition_functions_and_neurons_are_written_for_the_tab(tmp_path: Path) -> None:
    snapshots = Snapshots()
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    settings: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    monitors = [
        MultifractalMonitor(every_n_steps=4, detail="all"),
        MultifractalMonitor("neuromfa", every_n_steps=4, max_neurons=50, num_repeats=2, detail="all"),
    ]

    L.Trainer(max_epochs=1, logger=logger, callbacks=[*monitors, snapshots], **settings).fit(Classifier(mlp()))

    found, known = written(tmp_path / "run")
    weights = [snapshots.weights[4][f"net.{i}.weight"] for i in (0, 2, 4)]
    draws = torch.Generator().manual_seed(0)
    samples = multifractal_spectrum(weights, "neuromfa", max_neurons=50, num_repeats=2, generator=draws)
    at = known["lowrank_curve/multifractal_log_partition"]["sites"].index("net.2.weight.in")
    for source, place, scaling in (
        ("multifractal", at, multifractal_spectrum(weights[1], direction="in")),
        ("neuromfa", 0, samples[0]),
    ):
        for name, row in vectors(source, scaling).items():
            if "log_" in name or name.endswith("_density"):
                assert_close(torch.tensor(found[f"lowrank_curve/{name}"][4][place]).double(), row, rtol=1e-5, atol=1e-5)


def test_curves_for_the_tab_do_not_flood_the_other_tabs(tmp_path: Path) -> None:
    train(tmp_path / "run", MultifractalMonitor(every_n_steps=8, detail="all"), Classifier(mlp()))
    train(tmp_path / "other", MultifractalMonitor("neuromfa", every_n_steps=8, detail="all"), Classifier(mlp()))

    tags, of_model = (EventAccumulator(str(tmp_path / run)).Reload().Tags() for run in ("run", "other"))
    assert tags["histograms"] == [] and of_model["histograms"] == ["neuromfa_neuron_dimension_counts"]
    assert not [tag for tag in tags["scalars"] + of_model["scalars"] if "log_" in tag or "neuron_dimension" in tag]


def test_the_tabs_answers_have_the_spectra(tmp_path: Path) -> None:
    train(tmp_path / "run", MultifractalMonitor(every_n_steps=8, detail="all"), Classifier(mlp()))

    answer = answers.curves(reader_of(tmp_path), {"run": "run", "name": "multifractal_f", "site": "net.2.weight.in"})

    assert answer["steps"] == [0, 8, 16] and answer["sites"] == ["net.2.weight.in"]
    assert len(answer["axis"]) == answer["width"] == 31
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "report.html")]) in (0, None)
    assert "multifractal_alpha" in (tmp_path / "report.html").read_text()


def test_the_whole_model_is_the_chain_of_its_layers() -> None:
    net = mlp()

    found = numbers(NeuroMFA(), net)[""]

    scaling = multifractal_spectrum([net[i].weight.detach() for i in (0, 2, 4)], "neuromfa")
    for name in ("alpha0", "width", "kept_share", "decades", "scaling_fit"):
        assert found[f"neuromfa_{name}"] == pytest.approx(float(getattr(statistics, name)(scaling)))


def test_embeddings_are_no_layers_of_neurons_unless_named() -> None:
    net = nn.ModuleDict({"words": nn.Embedding(70, 64), "layer": nn.Linear(64, 64)})

    without, named = numbers(NeuroMFA(), net)[""], numbers(NeuroMFA(match="*"), net)[""]

    scaling = multifractal_spectrum([net["layer"].weight.detach()], "neuromfa")
    assert without["neuromfa_alpha0"] == pytest.approx(float(statistics.alpha0(scaling)))
    assert named["neuromfa_alpha0"] != without["neuromfa_alpha0"]


def test_fused_queries_keys_and_values_are_one_layer() -> None:
    net = nn.ModuleDict({"qkv": nn.Linear(64, 192)})

    found = numbers(NeuroMFA(), net)[""]

    scaling = multifractal_spectrum([net["qkv"].weight.detach()], "neuromfa")
    assert found["neuromfa_alpha0"] == pytest.approx(float(statistics.alpha0(scaling)))


def test_nulls_have_the_norms_and_not_the_structure() -> None:
    """Rows of scales of their own: shuffled they are alike, as in the Gaussian of that variance."""
    layer = nn.Linear(256, 256)
    layer.weight.data = 0.05 * jittered(256, 256, spread=0.5).float().mT

    found = numbers(NeuroMFA(), nn.Sequential(layer))[""]

    assert found["neuromfa_width"] > 2 * max(found["neuromfa_width_shuffled"], found["neuromfa_width_gaussian"])
    assert found["neuromfa_kept_share"] == 1


def test_fewer_orders_change_nothing_of_the_nulls(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp(128)
    few = numbers(NeuroMFA(), net)
    monkeypatch.setattr(network_source, "FEW_ORDERS", ORDERS)

    every = numbers(NeuroMFA(), net)

    assert_close(few, every, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_growing_weights_emerge_and_their_nulls_as_much() -> None:
    source, net = NeuroMFA(), mlp(128)
    numbers(source, net)
    with torch.no_grad():
        for layer in (net[0], net[2], net[4]):
            layer.weight.mul_(2)

    found = numbers(source, net, seed=1)[""]

    assert found["neuromfa_emergence"] > 0.1
    assert found["neuromfa_emergence_shuffled"] == pytest.approx(found["neuromfa_emergence"], rel=0.15)


def test_rank_mode_does_not_see_growing_weights() -> None:
    source, net = Multifractal(), mlp()
    before = numbers(source, net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4)

    after = numbers(source, net)

    assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_emergence_is_held_against_the_first_sample() -> None:
    logger = watched(mlp(), MultifractalMonitor("neuromfa", every_n_steps=2, detail="all"), max_epochs=2)

    for end in ("", "_shuffled", "_gaussian"):
        alpha0, width, found = (
            list(logger.curve(f"neuromfa/{name}{end}").values()) for name in ("alpha0", "width", "emergence")
        )
        firsts = torch.tensor(alpha0[0]), torch.tensor(width[0])
        expected = [
            float(emergence(torch.tensor(a), torch.tensor(w), *firsts)) for a, w in zip(alpha0, width, strict=True)
        ]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert found[0] == 0


@pytest.mark.parametrize("threshold", [150.0, None])
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
def test_a_resumed_run_keeps_what_emergence_is_held_against(threshold: float | None, tmp_path: Path) -> None:
    def run(epochs: int, root: Path, *callbacks: L.Callback, **options: Any) -> MemoryLogger:
        logger = MemoryLogger()
        L.seed_everything(0, verbose=False)
        monitor = MultifractalMonitor("neuromfa", every_n_steps=4, threshold=threshold, detail="all")
        settings: dict[str, Any] = {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": bool(callbacks),
        }
        trainer = L.Trainer(
            max_epochs=epochs, logger=logger, callbacks=[monitor, *callbacks], default_root_dir=root, **settings
        )
        trainer.fit(InOrder(0, 1, mlp()), **options)
        return logger

    whole = run(4, tmp_path)
    run(2, tmp_path, ModelCheckpoint(tmp_path / "checkpoints"))
    (path,) = tmp_path.rglob("*.ckpt")
    resumed = run(4, tmp_path, ckpt_path=path)

    for name in ("emergence", "emergence_shuffled", "alpha0", "width_gaussian"):
        second = resumed.curve(f"neuromfa/{name}")
        assert second == pytest.approx(
            {step: value for step, value in whole.curve(f"neuromfa/{name}").items() if step in second}
        )
        assert list(second) == [8, 12]


@pytest.mark.parametrize("mode", ["rank", "neuromfa"])
def test_the_same_neurons_are_looked_at_at_every_sample(mode: Any) -> None:
    logger = watched(
        mlp(), MultifractalMonitor(mode, every_n_steps=1, max_neurons=30, detail="all"), max_steps=4, max_epochs=-1
    )
    source = Multifractal(max_neurons=30) if mode == "rank" else NeuroMFA(max_neurons=30)
    net = mlp()

    first, second = numbers(source, net, seed=1), numbers(source, net, seed=2)

    own = {
        site: {name: v for name, v in row.items() if not name.endswith(("_shuffled", "_gaussian"))}
        for site, row in first.items()
    }
    assert_close(
        {site: {name: second[site][name] for name in row} for site, row in own.items()},
        own,
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    assert logger.curves()


def test_sampled_neurons_have_errors_where_sampling_is_known_to_tell_them() -> None:
    net = nn.Sequential(nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 10))

    logger = watched(
        net, MultifractalMonitor(max_neurons=FEWEST_NODES, match="*.0.weight", per_site=True, detail="all")
    )

    errors = sorted({tag.partition("/")[0] for tag in logger.curves() if "_error/" in tag})
    assert errors == [f"multifractal_{name}_error" for name in ("alpha0", "box_dimension", "c2_excess")]
    assert 0 < logger.curve("multifractal_alpha0_error/net.0.weight.in")[0] < 0.05


def test_samples_of_a_network_tell_the_error_of_their_mean() -> None:
    logger = watched(mlp(256), MultifractalMonitor("neuromfa", max_neurons=40, num_repeats=5, detail="all"))

    whole = watched(mlp(256), MultifractalMonitor("neuromfa", max_neurons=40, num_repeats=1, detail="all"))
    assert 0 < logger.curve("neuromfa/width_error")[0] < logger.curve("neuromfa/width")[0]
    assert not [tag for tag in whole.curves() if "_error" in tag]


@pytest.mark.parametrize("kind", [Multifractal, NeuroMFA])
@pytest.mark.parametrize("max_neurons", [None, 20])
def test_the_device_is_not_waited_for(kind: type[Multifractal] | type[NeuroMFA], max_neurons: int | None) -> None:
    source = kind(max_neurons=max_neurons)
    net, waits = nn.Sequential(ImageNet(), mlp()), Waits("cpu")
    source.plan(LoopTraining(net))

    with waits:
        source.batch_begins(Batch(LoopTraining(net), None, 0, 0))

    assert source.numbers(Team())
    assert waits.seen == {}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no neurons": (
        lambda: MultifractalMonitor(max_neurons=0, detail="all"),
        "max_neurons=0 must be a whole number of at least 2",
    ),
    "one neuron": (
        lambda: MultifractalMonitor("neuromfa", max_neurons=1, detail="all"),
        "max_neurons=1 must be a whole number of at least 2",
    ),
    "no repeats": (
        lambda: MultifractalMonitor("neuromfa", num_repeats=0, detail="all"),
        "num_repeats=0 must be a whole number of at least 1",
    ),
    "more radii than memory": (
        lambda: MultifractalMonitor("neuromfa", threshold=1e9, detail="all"),
        "threshold=1000000000.0: .* to 10000",
    ),
    "a long seed": (lambda: MultifractalMonitor("neuromfa", seed=2**70, detail="all"), "must be a whole number from 0"),
    "no edges": (lambda: MultifractalMonitor("neuromfa", threshold=1.0, detail="all"), r"threshold=1.0: .*from 2"),
    "an infinite edge": (lambda: MultifractalMonitor("neuromfa", threshold=math.inf, detail="all"), "threshold=inf"),
    "a threshold of ranks": (
        lambda: MultifractalMonitor(threshold=100.0, detail="all"),
        "threshold=100.0.*mode='neuromfa'",
    ),
    "repeats of ranks": (lambda: MultifractalMonitor(num_repeats=3, detail="all"), "num_repeats=3.*mode='neuromfa'"),
    "heads of a whole model": (
        lambda: MultifractalMonitor("neuromfa", heads=True, detail="all"),
        "heads=True.*mode='rank'",
    ),
    "a cadence and a budget": (
        lambda: MultifractalMonitor(every_n_steps=20, max_overhead=0.01, detail="all"),
        "every_n_steps=20 and max_overhead",
    ),
    "never due": (lambda: MultifractalMonitor(every_n_steps=0, detail="all"), "every_n_steps=0.*at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_argument_is_refused_when_it_is_made(case: str) -> None:
    make, message = REFUSED[case]

    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("mode", ["rank", "neuromfa"])
@pytest.mark.parametrize("option", ["match", "exclude"])
def test_a_pattern_that_fits_nothing_is_refused_before_training(mode: Any, option: str) -> None:
    monitor = MultifractalMonitor(mode, **{option: "*.attention.*"}, detail="all")  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=rf"{option}.*attention"):
        watched(mlp(), monitor)


def both(rank: int, size: int, root: Path) -> Any:
    """What the two modes log in a training of several processes, or of one; not what it cost, nor the loss."""
    L.seed_everything(0, verbose=False)
    monitors, logger = (
        [MultifractalMonitor(per_site=True, detail="all"), MultifractalMonitor("neuromfa", detail="all")],
        MemoryLogger(),
    )
    fitted(InOrder(rank, size, mlp()), [*monitors], logger, size)
    curves = {
        tag: curve
        for tag, curve in logger.curves().items()
        if tag != "loss" and not tag.endswith(("_time_ms", "_percent"))
    }
    return {"curves": curves, "failures": [monitor.failures for monitor in monitors]}


@pytest.mark.slow
def test_two_processes_log_what_one_does(tmp_path: Path) -> None:
    first, second = together(both, tmp_path)
    alone = both(0, 1, tmp_path)

    assert_close(first["curves"], alone["curves"], equal_nan=True)
    assert first["failures"] == second["failures"] == [0, 0]
    assert second["curves"] == {}


def sharded(rank: int, size: int, root: Path) -> Any:
    """The same of weights that no process has whole."""
    found = {}
    for mode in ("rank", "neuromfa"):
        strategy = ModelParallelStrategy(
            data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        options: dict[str, Any] = {"strategy": strategy, "devices": size} if size > 1 else {}
        monitor = MultifractalMonitor(mode, every_n_steps=1, detail="all")  # type: ignore[arg-type]
        samples, _ = trained_sharded(Sharded(sharded=size > 1), monitor, MemoryLogger(), root, **options)
        found[mode] = {"first": samples[0], "failures": monitor.failures}
    return found


@pytest.mark.slow
def test_numbers_of_sharded_weights_are_those_of_whole_ones(tmp_path: Path) -> None:
    first, second = together(sharded, tmp_path)
    alone = sharded(0, 1, tmp_path)

    for mode in ("rank", "neuromfa"):
        assert first[mode]["failures"] == second[mode]["failures"] == 0
        assert_close(first[mode]["first"], alone[mode]["first"], equal_nan=True)
        assert_close(second[mode]["first"], alone[mode]["first"], equal_nan=True)


@pytest.mark.parametrize("mode", ["rank", "neuromfa"])
def test_patterns_that_leave_nothing_are_refused_before_training(mode: Any) -> None:
    with pytest.raises(ValueError, match=r"match=\[\].*leaves no matrix"):
        watched(mlp(), MultifractalMonitor(mode, match=[], detail="all"))


@pytest.mark.parametrize("kind", [Multifractal, NeuroMFA])
def test_the_smallest_integers_have_their_magnitudes(kind: type[Multifractal] | type[NeuroMFA]) -> None:
    def found(held: Tensor) -> dict[str, dict[str, float]]:
        return numbers(kind(match="held"), Holding(held))

    entries = torch.randint(-128, 128, (64, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))

    assert_close(found(entries), found(entries.float()), rtol=0, atol=0, equal_nan=True)


def test_a_threshold_is_not_taken_from_weights_that_are_no_numbers() -> None:
    source, net = NeuroMFA(threshold=None), mlp()
    broken = mlp()
    nn.init.constant_(broken[0].weight, math.inf)

    first = numbers(source, broken)[""]
    second = numbers(source, net)[""]

    assert math.isnan(first["neuromfa_alpha0"])
    assert_close(second, numbers(NeuroMFA(threshold=None), net)[""], rtol=0, atol=0, equal_nan=True)


def test_where_all_neurons_are_looked_at_there_is_no_sampling_error() -> None:
    net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))

    logger = watched(net, MultifractalMonitor(max_neurons=400, match="*.0.weight", per_site=True, detail="all"))

    assert set(logger.curve("multifractal_alpha0_error/net.0.weight.in").values()) == {0.0}
