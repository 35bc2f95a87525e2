"""What a plan says: against formulas, against a real run of four processes, and of what it cannot know."""

import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import large
from benchmarks.gpu import GPT
from benchmarks.plan import parts
from examples.char_transformer import CONTEXT, CharTransformer
from lightning_lowrank.analysis.cli import main
from lightning_lowrank.analysis.planning.counting import Counting, Moving, Work, counted
from lightning_lowrank.analysis.planning.devices import Device, devices, interpolated
from lightning_lowrank.analysis.planning.plan import Plan, plan_of, planned
from lightning_lowrank.distributed import team
from tests.processes import together

SIZES = {"depth": 2, "width": 64, "vocabulary": 500, "length": large.WORDS}
# Of a process at once, so that small matrices take several rounds.
ROUND = 2**15


def transformer() -> nn.Module:
    return GPT(**SIZES)


def with_inputs() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)), torch.zeros(7, 20)


def vectors() -> nn.Module:
    return nn.LayerNorm(8)


def wide() -> nn.Module:
    return nn.Linear(2000, 2500)


def number() -> int:
    return 3


def broken() -> nn.Module:
    """Whose author forgot an argument."""
    return nn.Linear(4)  # type: ignore[call-arg]


def misfit() -> tuple[nn.Module, torch.Tensor]:
    """Inputs of another width."""
    return nn.Linear(4, 3), torch.zeros(2, 5)


def needs_more(width: int) -> nn.Module:
    return nn.Linear(width, width)


def named(function: str) -> str:
    return f"{__name__}:{function}"


def work(short: int, long: int) -> float:
    """Gram products, and eigenvalues by Householder's tridiagonalisation (Golub & Van Loan, 8.3)."""
    return 2 * short**2 * long + 4 / 3 * short**3


def test_flops_and_routes_are_those_of_the_formulas() -> None:
    width, depth = SIZES["width"], SIZES["depth"]
    blocks = depth * (work(width, 3 * width) + work(width, width) + 2 * work(width, 4 * width))
    rest = work(width, SIZES["vocabulary"]) + work(min(width, SIZES["length"]), max(width, SIZES["length"]))

    costs = plan_of(transformer(), (), "cpu").costs

    assert costs.matrices == {"Gram, float64": 3 * (4 * depth + 2)}
    assert costs.flops.total() == pytest.approx(3 * (blocks + rest), rel=1e-5)
    assert costs.total_flops == costs.flops.total()
    assert costs.largest == 4 * width * SIZES["vocabulary"]
    assert costs.kept == 4 * sum(p.numel() for p in transformer().parameters() if p.ndim > 1)
    assert (sum(costs.sent), costs.collectives, costs.pooled) == (0, 0, 0)


def test_a_large_matrix_is_sketched_and_half_precision_takes_half_the_memory() -> None:
    single, half = plan_of(wide(), (), "cpu"), plan_of(wide(), (), "cpu", dtype="bf16")

    assert single.costs.matrices == {"sketch": 3}
    assert half.costs.kept * 2 == single.costs.kept == 4 * 2000 * 2500
    assert single.sample_ms is not None
    assert single.sample_ms > 0


def test_a_step_takes_three_times_the_products_of_a_forward_pass() -> None:
    rows, entries = 7, 20 * 30 + 30 * 5

    by_inputs = planned(named("with_inputs"))
    by_tokens = plan_of(with_inputs()[0], (), "cpu", tokens_per_step=rows)

    assert by_inputs.step_flops == by_tokens.step_flops == 3 * 2 * rows * entries
    assert by_inputs.in_steps == pytest.approx(by_inputs.costs.total_flops / (6 * rows * entries))
    assert by_inputs.share is not None
    assert plan_of(with_inputs()[0], (), "cpu").share is None


def test_a_step_reads_and_writes_the_operands_and_results_of_each_function() -> None:
    rows, entries = 7, 20 * 30 + 30 * 5
    of_linear, of_relu = rows * (20 + 30 + 30 + 5), rows * 2 * 30

    by_inputs = planned(named("with_inputs"))

    assert by_inputs.step_bytes == 3 * 4 * (entries + 30 + 5 + of_linear + of_relu)
    assert plan_of(with_inputs()[0], (), "cpu").step_bytes is None


def test_tokens_stand_for_the_inputs_of_a_transformer() -> None:
    inputs = torch.zeros(8, CONTEXT, dtype=torch.long)

    by_inputs = plan_of(CharTransformer(100), (inputs,), "cpu")
    by_tokens = plan_of(CharTransformer(100), (), "cpu", tokens_per_step=inputs.numel())

    assert by_tokens.step_bytes == pytest.approx(by_inputs.step_bytes, rel=0.1)
    assert by_tokens.step_flops == pytest.approx(by_inputs.step_flops, rel=0.1)


def test_only_what_makes_or_changes_a_tensor_moves_bytes() -> None:
    x, lstm = torch.zeros(2, 100, 8, device="meta"), nn.LSTM(8, 8, batch_first=True, device="meta")
    # Its states are made, read, and written.
    of_lstm = 2 * x.numel() + 3 * 2 * 2 * 8 + sum(p.numel() for p in lstm.parameters())
    jobs: dict[Callable[[], Any], int] = {
        lambda: x.view(-1, 8).mT.unflatten(0, (2, 4)).to(torch.float32)[0].contiguous().shape: 2 * x.numel() // 2,
        lambda: x.contiguous().to(torch.float32).detach(): 0,
        lambda: x + 1: 2 * x.numel(),
        lambda: x.add_(1): x.numel(),
        lambda: lstm(x): of_lstm,
    }

    for job, numbers in jobs.items():
        with counted(Counting()), Moving() as moving:
            job()
        assert moving.bytes == 4 * numbers


def test_the_time_of_a_step_adds_up_its_kinds_of_work() -> None:
    of_samples = dict.fromkeys(("sample_ms", "matrix_ms", "side_ms", "element_ns"), 0.0)
    of_steps = {"step_ms": 1.0, "parameter_ms": 0.1, "entry_ns": 4.0, "byte_ns": 0.5, "training": 1e9}
    device = Device("", (), (), (), **of_samples, **of_steps)

    assert device.step(3e6, 2e6, 20, 10**6) == pytest.approx(1 + 2 + 4 + 1 + 3)


def test_a_known_step_is_taken_as_it_is_said() -> None:
    said = plan_of(transformer(), (), "cpu", step_ms=10.0, every_n_steps=20)

    assert said.sample_ms is not None
    assert said.share == pytest.approx(100 * said.sample_ms / 200)


def test_counting_knows_what_is_alive() -> None:
    with counted(Counting()) as counting:
        kept = torch.ones(100, dtype=torch.float64)
        (kept * 2).sum()
        product = kept[:64].view(8, 8) @ kept[:64].view(8, 8)

    assert counting.held == 800 + product.nbytes
    assert 1600 <= counting.peak <= 1600 + product.nbytes
    assert counting.flops == Counter({Work("products", torch.float64, 8): 2 * 8**3})


def test_rates_are_interpolated_by_powers_and_held_beyond_the_ends() -> None:
    rates = [(10, 100.0), (1000, 10000.0)]

    assert [interpolated(rates, side) for side in (1, 10, 100, 1000, 9999)] == pytest.approx([100, 100, 1000, 1e4, 1e4])


def test_every_class_of_devices_was_measured_in_full() -> None:
    for device in devices().values():
        assert len(device.products) > 5 < len(device.eigenvalues)
        assert device.training > 0 < device.sample_ms
        assert device.step_ms > 0 < device.byte_ns
        assert "torch" in device.what


def rehearsal(round_: int, **sizes: int) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "ROUND", round_)
        return plan_of(GPT(**SIZES | sizes), (), "cpu", num_devices=4)


def real(rank: int, size: int, root: Path) -> Any:
    team.ROUND = ROUND
    return large.trained(rank, size, root, SIZES, steps=4, every=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_four_processes_send_what_was_planned_and_nothing_between_samples(tmp_path: Path) -> None:
    costs = rehearsal(ROUND).costs

    found = together(real, tmp_path, 4)

    due, others = (0, 2), (1, 3)
    assert costs.collectives > 3
    for rank, seen in enumerate(found):
        assert seen.failures == 0
        for step in due:
            assert seen.bytes[step][large.EXCHANGE] == costs.sent[rank]
            assert seen.calls[step][large.EXCHANGE] == costs.collectives
            assert seen.bytes[step][large.POOL] == costs.pooled
        assert [seen.calls[step].total() for step in others] == [0, 0]
    # The numbers that are found take some too.
    assert 0.8 * costs.peak < found[costs.rank].peak < 1.25 * costs.peak
    assert max(seen.peak for seen in found) - 2 * costs.kept < 4 * costs.largest


def test_rounds_bound_the_memory_by_the_largest_matrix() -> None:
    within, at_once = (rehearsal(round_, depth=12, vocabulary=100).costs for round_ in (1, 2**40))

    # Beyond the copies of shards and their differences, in single precision both.
    assert within.peak - 2 * within.kept < 4 * within.largest
    assert at_once.peak > 1.3 * within.peak
    assert at_once.sent == within.sent
    assert at_once.collectives < within.collectives


def test_the_table_says_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", named("transformer"), "--devices", "4", "--device-class", "abacus"])

    told = capsys.readouterr().out
    assert "unmeasured" in told
    assert "NTKMonitor" in told
    assert "bytes that a device sends" in told
    assert max(map(len, told.splitlines())) <= 100


def test_a_share_that_is_not_known_says_which_option_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", named("transformer")])

    assert "unmeasured: give --step-ms" in capsys.readouterr().out


def test_a_program_gets_numbers_and_null(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", named("transformer"), "--dtype", "bf16", "--tokens-per-step", "100", "--json"])

    told = json.loads(capsys.readouterr().out)
    assert told["matrices"] == {"Gram, float64": 30}
    assert told["sample_ms"] > 0
    assert told["share_percent"] > 0
    assert told["num_parameters"] == sum(p.numel() for p in transformer().parameters())
    main(["plan", named("transformer"), "--device-class", "abacus", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [told[name] for name in ("sample_ms", "step_ms", "share_percent", "in_steps")] == [None] * 4


REFUSED = {
    "transformer": (["no_colon"], "module:function"),
    "no module": (["nowhere.at_all:gpt"], "cannot be imported"),
    "no function": ([named("gpt")], "has no function 'gpt'; it has"),
    "no nn.Module": ([named("number")], "returned a int"),
    "arguments": ([named("needs_more")], "without arguments"),
    "its own TypeError": ([named("broken")], "broken raised TypeError: Linear.__init__.. missing"),
    "inputs of another shape": (
        [named("misfit")],
        r"Linear fails on the inputs \[\[2, 5\]\]: RuntimeError: .*5",
    ),
    "no matrix": ([named("vectors")], "no matrix"),
    "source": ([named("transformer"), "--sources", "features"], "optimizer_state"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_planned_is_refused_with_what_could(case: str) -> None:
    words, says = REFUSED[case]

    with pytest.raises(SystemExit, match=says):
        main(["plan", *words])


def test_numbers_below_1_are_refused() -> None:
    for options in ({"num_devices": 0}, {"step_ms": 0.0}, {"every_n_steps": 0}):
        with pytest.raises(ValueError, match="above 0"):
            partial(planned, named("transformer"))(**options)  # type: ignore[arg-type]


def test_the_transformer_of_the_benchmarks_begins_where_one_does_that_was_never_trained() -> None:
    torch.manual_seed(0)
    module = GPT(depth=1, vocabulary=2000, length=32)
    words = torch.randint(2000, (2, 33))

    with torch.no_grad():
        chances, loss = module(words[:, :-1]).softmax(-1), module.training_step([words], 0)
    assert float(loss) == pytest.approx(math.log(2000), rel=0.1)
    # Numbers below the smallest normal one are slow on some processors.
    assert float(chances.min()) > torch.finfo(chances.dtype).tiny


@pytest.mark.parametrize(("products", "eigenvalues"), [(2.0, 3.0), (0.5, 9.5)])
def test_speeds_of_products_and_eigenvalues_are_told_apart(products: float, eigenvalues: float) -> None:
    assert parts(products + eigenvalues, 5 * products + eigenvalues) == pytest.approx((products, eigenvalues))


@pytest.mark.parametrize(("once", "more"), [(2.0, 1.0), (2.0, 2.0), (1.0, 100.0)])
def test_no_speed_is_negative_or_infinite_though_other_work_delays_one_of_the_jobs(once: float, more: float) -> None:
    assert min(parts(once, more)) >= once / 20
