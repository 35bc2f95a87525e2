"""Features: spectra of what layers put out, beside numpy's of outputs collected by hooks of our own."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_lowrank import Every, Features, Monitor, Probe
from lightning_lowrank.distributed.team import Team
from lightning_lowrank.measuring.source import Batch
from lightning_lowrank.watching.loops import LoopTraining
from tests.oracles.spectra import RANKS
from tests.trainings import Checkpointed, Classifier, ImageNet, MemoryLogger, Validated, convnext, gpt2, swin

STATISTICS = ("effective_rank", "stable_rank", "frobenius_norm")
Rows = dict[str, list[list[NDArray[np.float64]]]]


class Outputs(L.Callback):
    """Keeps what the layers of some names put out: by layer, then by batch."""

    def __init__(self, *names: str, stage: str = "train") -> None:
        self.names, self.training = names, stage == "train"
        self.rows: Rows = defaultdict(list)

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for name in self.names:
            module.get_submodule(name).register_forward_hook(
                lambda layer, _, output, name=name: self.keep(trainer, name, output)
            )

    def keep(self, trainer: L.Trainer, name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if trainer.training is self.training and not trainer.sanity_checking:
            self.rows[name].append(output.detach().double().numpy())


class Sequence(nn.Module):
    """Embedding, attention, recurrence and a convolution over the first 12 pixels as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.recurrence = nn.LSTM(12, 10, batch_first=True)
        self.convolution = nn.Conv1d(10, 6, 3)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding((16 * x[:, 20:32]).long())
        x = self.recurrence(self.attention(x, x, x)[0])[0]
        return self.head(self.convolution(x.mT).mean(-1))


def run(
    module: L.LightningModule, source: Features, *others: L.Callback, every: int = 1, **options: Any
) -> MemoryLogger:
    """What a monitor of that source logs while the module trains."""
    logger = MemoryLogger()
    monitor = Monitor([Probe(source.name, source, STATISTICS, Every(every))], per_site=True, detail="all")
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
    }
    L.seed_everything(5, verbose=False)
    L.Trainer(**(quiet | options), logger=logger, callbacks=[monitor, *others]).fit(module)
    assert monitor.failures == 0
    return logger


def agrees(
    logger: MemoryLogger, quantity: str, label: str, rows: list[NDArray[np.float64]], *, centred: bool = False
) -> None:
    """Whether the curve of a layer is that of these rows by numpy, one matrix per sample."""
    assert rows
    for statistic in STATISTICS:
        values = [np.linalg.svd(r - r.mean(0) * centred, compute_uv=False) for r in rows]
        curve = list(logger.curve(f"{quantity}_{statistic}/{label}.out").values())
        assert_close(np.array(curve), np.array([RANKS[statistic](v) for v in values]), rtol=1e-5, atol=0)


def last(output: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of an output that has its features last."""
    return output.reshape(-1, output.shape[-1])


def second(output: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of an output that has its features second: one per position."""
    return last(np.moveaxis(output, 1, -1))


CONVNEXT, SWIN = "net.network.encoder.stages.1.layers.0", "net.network.encoder.layers.0.blocks.0"

LAYERS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 10)), "net.0", last),
    "convolution in two dimensions": (ImageNet, "net.convolution", second),
    "convolution in one dimension": (Sequence, "net.convolution", second),
    "embedding": (Sequence, "net.embedding", last),
    "attention": (Sequence, "net.attention", last),
    "recurrence": (Sequence, "net.recurrence", last),
    "linear in ConvNeXt, four axes": (convnext, f"{CONVNEXT}.pwconv2", last),
    "convolution in ConvNeXt": (convnext, f"{CONVNEXT}.dwconv", second),
    "linear in Swin": (swin, f"{SWIN}.mlp.fc1", last),
    "Conv1D of transformers": (gpt2, "net.network.h.0.mlp.c_fc", last),
}


@pytest.mark.parametrize("centred", [False, True], ids=["as they are", "centred"])
@pytest.mark.parametrize("case", LAYERS)
def test_features_are_the_spectra_of_the_outputs(case: str, centred: bool) -> None:
    make, name, rows = LAYERS[case]
    outputs = Outputs(name)
    logger = run(Classifier(make()), Features(centred=centred), outputs, every=3)

    agrees(
        logger,
        "centred_feature" * centred or "feature",
        name,
        [rows(o) for o in outputs.rows[name][::3]],
        centred=centred,
    )


def test_rows_are_pooled_over_an_accumulation_window() -> None:
    outputs = Outputs("net.0")
    logger = run(Classifier(), Features(), outputs, accumulate_grad_batches=3)
    batches = [last(o) for o in outputs.rows["net.0"]]

    # 8 batches: the last window has two.
    agrees(logger, "feature", "net.0", [np.concatenate(batches[i : i + 3]) for i in (0, 3, 6)])
    assert list(logger.curve("lowrank/feature_rows").values()) == [24, 24, 16]


def test_validation_is_pooled_over_the_whole_loop() -> None:
    outputs = Outputs("net.0", stage="validation")
    logger = run(Validated(), Features(stage="validation"), outputs, max_epochs=2)
    batches = [last(o) for o in outputs.rows["net.0"]]

    agrees(logger, "validation_feature", "net.0", [np.concatenate(batches[:2]), np.concatenate(batches[2:])])
    assert list(logger.curve("lowrank/validation_feature_rows").values()) == [32, 32]


def test_rows_of_the_layer_with_the_fewest_are_logged() -> None:
    logger = run(Classifier(Sequence()), Features(), every=4)

    assert list(logger.curve("lowrank/feature_rows").values()) == [8, 8]


def test_a_layer_called_twice_gives_the_rows_of_both() -> None:
    shared = nn.Linear(64, 64)
    outputs = Outputs("net.0")
    logger = run(
        Classifier(nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(64, 10))), Features(match="*.0"), outputs, every=8
    )

    agrees(logger, "feature", "net.0", [np.concatenate([last(o) for o in outputs.rows["net.0"][:2]])])


@pytest.mark.parametrize("reentrant", [False, True], ids=["without reentry", "reentrant"])
def test_activation_checkpointing_counts_rows_once(reentrant: bool) -> None:
    plain, watched = (run(Classifier(Checkpointed(kind)), Features(), every=2) for kind in (None, reentrant))
    tags = [tag for tag in plain.curves() if "feature" in tag]

    assert "lowrank/feature_rows" in tags
    assert_close({tag: watched.curve(tag) for tag in tags}, {tag: plain.curve(tag) for tag in tags})


def in_place(net: nn.Module) -> nn.Module:
    net.compile()
    return net


COMPILED = {
    "wrapped": lambda: Classifier(torch.compile(nn.Sequential(nn.Linear(64, 10)))),
    "in place": lambda: Classifier(in_place(nn.Sequential(nn.Linear(64, 10)))),
    "the whole module": lambda: torch.compile(Classifier()),
}


@pytest.mark.parametrize("case", COMPILED)
def test_a_layer_inside_a_compiled_module_is_refused_before_training(case: str) -> None:
    with pytest.raises(
        ValueError, match=r"features of 'net.*0' cannot be measured, since hooks inside a compiled module never run"
    ):
        run(COMPILED[case](), Features())


def labels(net: nn.Module, **options: Any) -> list[str]:
    """Names of the layers that a source would read."""
    source = Features(**options)
    source.plan(LoopTraining(Classifier(net)))
    return source.labels()


def test_the_fast_path_of_transformers_is_refused_in_validation() -> None:
    net = nn.TransformerEncoderLayer(64, 2, batch_first=True)

    assert labels(net) == ["net.self_attn.out", "net.linear1.out", "net.linear2.out"]
    with pytest.raises(
        ValueError, match=r"features of 'net\.linear1' cannot be measured, since a hook would turn off the fast path"
    ):
        labels(net, stage="validation")


def test_projection_of_attention_is_no_layer_of_its_own() -> None:
    assert labels(Sequence()) == [
        f"net.{name}.out" for name in ("embedding", "attention", "recurrence", "convolution", "head")
    ]


def test_layers_are_chosen_by_name_and_type() -> None:
    assert labels(Sequence(), match=["type:Conv1d", "*.head"]) == ["net.convolution.out", "net.head.out"]
    assert labels(Sequence(), exclude=["type:RNNBase", "re:e.*g$", "net.a*"]) == ["net.convolution.out", "net.head.out"]


def test_wide_layers_are_left_out() -> None:
    assert labels(Sequence(), max_width=9) == ["net.convolution.out"]


def test_a_pattern_that_fits_nothing_is_refused_with_what_is_near() -> None:
    with pytest.raises(ValueError, match=r"match: 'type:Conv2d' matches nothing.*Conv1d"):
        labels(Sequence(), match="type:Conv2d")


def test_an_unknown_stage_is_refused() -> None:
    source = Features()
    source.stage = "test"  # type: ignore[assignment]

    # Not by the constructor: the types that tests check there would speak first.
    with pytest.raises(ValueError, match=r"stage='test'.*'train' or 'validation'"):
        source.__post_init__()


def sampled(source: Features, module: L.LightningModule, *batches: Tensor) -> dict[str, Any]:
    """Shapes of the matrices that a sample of these batches gives, by label; hooks taken away."""
    source.plan(LoopTraining(module))
    for batch in batches:
        source.batch_begins(Batch(LoopTraining(module), None, 0, 0))
        module(batch)
    source.batch_over()
    return {reading.labels[0]: tuple(reading.shape) for reading in source.sample_over(Team())}


def test_unbatched_outputs_of_a_convolution_have_their_channels_first() -> None:
    assert sampled(Features(), Classifier(nn.Conv1d(2, 3, 5)), torch.ones(2, 9)) == {"net.out": (5, 3)}


def test_a_layer_whose_width_changes_is_left_without_a_number() -> None:
    source, module = Features(match="*"), Classifier(nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool1d(7)))
    with pytest.raises(ValueError, match=r"the output of 'net\.0' changed its width to 5"):
        sampled(source, module, torch.ones(4, 9), torch.ones(4, 5))

    assert [reading.labels for reading in source.sample_over(Team())] == [("net.out",), ("net.1.out",)]


def test_rows_of_a_sample_given_up_are_forgotten() -> None:
    source, module = Features(), Classifier()
    source.plan(LoopTraining(module))
    source.batch_begins(Batch(LoopTraining(module), None, 0, 0))
    module(torch.ones(3, 64))
    source.detach()

    assert sampled(source, module, torch.ones(5, 64)) == {"net.0.out": (5, 32), "net.2.out": (5, 10)}


def test_training_without_any_statistic_of_a_pair() -> None:
    with pytest.raises(ValueError, match=r"'subspace_overlap'.*Features offers.*'stable_rank'"):
        Probe("feature", Features(), ["subspace_overlap"])
