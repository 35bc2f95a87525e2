"""Oracles: torch's own loss functions, differentiated twice by torch in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_lowrank.loss.calls import LossCall, rows_of
from lightning_lowrank.loss.output_loss import ClosedForm, Differentiated, OutputLoss

DRAWS = 4_000


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, classes: int = 4, ignored: int | None = None) -> Tensor:
    drawn = torch.randint(classes, shape, generator=torch.Generator().manual_seed(2))
    return drawn if ignored is None else torch.where(drawn == 1, ignored, drawn)


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
MASK = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)
ROWS, IMAGES, ONE = draw(5, 4), draw(3, 4, 2, 2), draw(4)
PROBABILITIES = draw(5, 4, seed=3).softmax(-1)
POSITIVES = (draw(5, 4, seed=4) > 0).double()


def of_log_softmax(function: Callable[..., Tensor], inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return function(inputs.log_softmax(1 if inputs.ndim > 1 else 0), *args, **kwargs)


# What the step makes of the loss that the call gave.
def masked(loss: Tensor) -> Tensor:
    return (loss * MASK).sum() / MASK.sum()


def plain(loss: Tensor) -> Tensor:
    return loss


CASES: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor, dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "cross entropy": (F.cross_entropy, ROWS, labels(5), {}, plain),
    "a third of a cross entropy": (F.cross_entropy, ROWS, labels(5), {}, lambda loss: loss / 3),
    "summed": (F.cross_entropy, ROWS, labels(5), {"reduction": "sum"}, plain),
    "masked": (F.cross_entropy, ROWS, labels(5), {"reduction": "none"}, masked),
    "ignored": (F.cross_entropy, ROWS, labels(5, ignored=-100), {}, plain),
    "ignored by another index, summed": (
        F.cross_entropy,
        ROWS,
        labels(5, ignored=7),
        {"ignore_index": 7, "reduction": "sum"},
        plain,
    ),
    "weighted": (F.cross_entropy, ROWS, labels(5, ignored=-100), {"weight": WEIGHT}, plain),
    "smoothed": (F.cross_entropy, ROWS, labels(5, ignored=-100), {"label_smoothing": 0.2}, plain),
    "smoothed and weighted": (
        F.cross_entropy,
        ROWS,
        labels(5, ignored=-100),
        {"label_smoothing": 0.2, "weight": WEIGHT},
        plain,
    ),
    "probabilities": (F.cross_entropy, ROWS, PROBABILITIES, {}, plain),
    "probabilities, all": (
        F.cross_entropy,
        ROWS,
        PROBABILITIES,
        {"label_smoothing": 0.1, "weight": WEIGHT, "reduction": "sum"},
        plain,
    ),
    "images": (F.cross_entropy, IMAGES, labels(3, 2, 2, ignored=-100), {"weight": WEIGHT}, plain),
    "images, not reduced": (
        F.cross_entropy,
        IMAGES,
        labels(3, 2, 2),
        {"reduction": "none"},
        lambda loss: (loss.detach() * loss).sum(),
    ),
    "images of probabilities": (F.cross_entropy, IMAGES, IMAGES.softmax(1), {}, plain),
    "one example": (F.cross_entropy, ONE, torch.tensor(2), {}, plain),
    "log likelihood": (F.nll_loss, ROWS, labels(5, ignored=-100), {"weight": WEIGHT}, plain),
    "log likelihood of images": (F.nll_loss, IMAGES, labels(3, 2, 2), {}, plain),
    "squares": (F.mse_loss, ROWS, PROBABILITIES, {}, plain),
    "half of squares, summed": (F.mse_loss, ROWS, PROBABILITIES, {"reduction": "sum"}, lambda loss: loss / 2),
    "weighted squares": (F.mse_loss, ROWS, PROBABILITIES, {"weight": POSITIVES + 0.5}, plain),
    "squares of numbers": (F.mse_loss, ONE, POSITIVES[0], {}, plain),
    "masked squares": (F.mse_loss, ROWS, PROBABILITIES, {"reduction": "none"}, lambda loss: masked(loss.mean(1))),
    "binary": (F.binary_cross_entropy_with_logits, ROWS, POSITIVES, {}, plain),
    "binary, soft": (F.binary_cross_entropy_with_logits, ROWS, PROBABILITIES, {"reduction": "sum"}, plain),
    "binary, weighted": (
        F.binary_cross_entropy_with_logits,
        ROWS,
        POSITIVES,
        {"weight": MASK[:, None], "pos_weight": WEIGHT},
        plain,
    ),
    "binary, masked": (
        F.binary_cross_entropy_with_logits,
        ROWS,
        POSITIVES,
        {"reduction": "none"},
        lambda loss: masked(loss.mean(1)),
    ),
}


class Example:
    """One case, in both forms; the oracle's is a function of what the case calls its inputs, laid out as rows."""

    def __init__(self, case: str) -> None:
        function, inputs, target, options, then = CASES[case]
        self.classes = function in (F.cross_entropy, F.nll_loss)
        self.shape = inputs.shape
        called = partial(of_log_softmax, function) if function is F.nll_loss else function
        self.rows = self.laid_out(inputs).clone().requires_grad_()
        self.loss = lambda rows: then(called(self.back(rows), target, **options))
        outputs = inputs.clone().requires_grad_()
        handed = outputs.log_softmax(1) if function is F.nll_loss else outputs
        given = function(handed, target, **options)
        (slope,) = torch.autograd.grad(then(given), given)
        self.found: ClosedForm = LossCall.of(function, (handed, target), options, given).as_output_loss(slope)
        # Log probabilities stand for logits: their own derivative goes before and after.
        self.through = (
            (lambda rows: rows - self.rows.softmax(-1) * rows.sum(-1, keepdim=True))
            if function is F.nll_loss
            else plain
        )

    def laid_out(self, tensor: Tensor) -> Tensor:
        if tensor.ndim == 1:
            return tensor[None] if self.classes else tensor[:, None]
        return tensor.movedim(1, -1).reshape(-1, tensor.shape[1]) if self.classes and tensor.ndim > 2 else tensor

    def back(self, rows: Tensor) -> Tensor:
        if len(self.shape) > 2:
            return rows.reshape(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)
        return rows.reshape(self.shape)

    def hessian(self) -> Tensor:
        size = self.rows.numel()
        return torch.autograd.functional.hessian(self.loss, self.rows.detach()).reshape(size, size)


@pytest.fixture(params=CASES)
def example(request: pytest.FixtureRequest) -> Example:
    return Example(request.param)


def test_the_value_is_that_of_torch(example: Example) -> None:
    assert_close(example.found.value(), example.loss(example.rows).detach())


def test_the_gradient_is_that_of_autograd(example: Example) -> None:
    (expected,) = torch.autograd.grad(example.loss(example.rows), example.rows)

    assert_close(example.through(example.found.gradient()).detach(), expected)


def test_the_hessian_is_that_of_double_backward(example: Example) -> None:
    unit = torch.eye(example.rows.numel(), dtype=torch.float64).view(-1, *example.rows.shape)
    found = torch.stack([example.found.hessian_product(rows).flatten() for rows in unit])

    assert_close(found, example.hessian())


def test_the_factor_is_a_root_of_the_hessian(example: Example) -> None:
    rows = draw(*example.rows.shape, seed=5)
    found = example.found.factor_product(example.found.factor_transposed_product(rows))

    assert_close(found, example.found.hessian_product(rows))


def test_the_factor_and_its_transpose_belong_together(example: Example) -> None:
    one, other = draw(2, *example.rows.shape, seed=6)

    assert_close(
        (example.found.factor_product(one) * other).sum(), (one * example.found.factor_transposed_product(other)).sum()
    )


@pytest.mark.parametrize(
    "case", ["smoothed and weighted", "images", "weighted squares", "binary, weighted", "probabilities, all"]
)
def test_the_covariance_of_sampled_gradients_is_the_hessian(case: str, generator: torch.Generator) -> None:
    found = Example(case).found
    drawn = torch.stack([found.sampled_gradients(generator) for _ in range(DRAWS)])
    products = drawn[:, :, :, None] * drawn[:, :, None, :] / found.num_rows
    error = products.std(0) / DRAWS**0.5
    blocks = torch.stack(
        [torch.stack([found.hessian_product(_entry(found, r, c))[r] for c in range(4)]) for r in range(found.num_rows)]
    )

    assert_close(drawn.mean(0), torch.zeros_like(drawn[0]), rtol=0, atol=float(5 * drawn.std() / DRAWS**0.5))
    assert ((products.mean(0) - blocks).abs() <= 5 * error + 1e-12).all()


def _entry(found: OutputLoss, row: int, column: int) -> Tensor:
    rows = torch.zeros(found.outputs.shape, dtype=torch.float64)
    rows[row, column] = 1
    return rows


def empirical_fisher(function: Callable[..., Tensor], inputs: Tensor, target: Tensor, **options: Any) -> Tensor:
    """In the space of the outputs: as many rows and columns as these have entries."""
    outputs = inputs.clone().requires_grad_()
    call = LossCall.of(function, (outputs, target), options, function(outputs, target, **options))
    rows = call.as_output_loss(torch.ones_like(call.loss)).row_gradients()
    return torch.block_diag(*(torch.outer(row, row) for row in rows)) / len(rows)


def of_rows_alone(function: Callable[..., Tensor], target: Tensor, weight: float) -> Tensor:
    """The same, by autograd from the loss of each row alone, times its weight in the whole loss."""
    blocks = []
    for row, wanted in zip(ROWS, target, strict=True):
        outputs = row.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(outputs, wanted), outputs)
        blocks.append(weight * torch.outer(slope, slope))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize(
    ("function", "target", "weights"),
    [
        (F.cross_entropy, labels(5), {"mean": 1 / 5, "sum": 1.0}),
        (F.mse_loss, PROBABILITIES, {"mean": 1 / 5, "sum": 4.0}),
        (F.binary_cross_entropy_with_logits, POSITIVES, {"mean": 1 / 5, "sum": 4.0}),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_empirical_fisher_adds_up_rows_by_their_weight_in_the_loss(
    function: Callable[..., Tensor], target: Tensor, weights: dict[str, float], reduction: str
) -> None:
    found = empirical_fisher(function, ROWS, target, reduction=reduction)

    assert_close(found, of_rows_alone(function, target, weights[reduction]))


def test_rows_that_are_ignored_have_no_part_in_the_empirical_fisher() -> None:
    target = labels(5, ignored=-100)
    counts = target != -100
    expected = empirical_fisher(F.cross_entropy, ROWS[counts], target[counts])
    found = empirical_fisher(F.cross_entropy, ROWS, target)

    assert 0 < counts.sum() < 5
    entries = counts.repeat_interleave(4)
    assert_close(found[entries][:, entries], expected)
    assert not found[~entries].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_empirical_fisher_does_not_tell_how_the_loss_is_called(reduction: str) -> None:
    """Sequences of tokens, as one tensor with an axis for the classes and as rows."""
    logits, tokens = draw(3, 2, 4), labels(3, 2)
    of_sequences = empirical_fisher(F.cross_entropy, logits.movedim(-1, 1), tokens, reduction=reduction)
    of_rows = empirical_fisher(F.cross_entropy, logits.reshape(6, 4), tokens.flatten(), reduction=reduction)

    assert_close(of_sequences, of_rows)


@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_the_empirical_fisher_grows_with_the_loss(factor: float) -> None:
    """As the Hessian does, so that the two can be compared."""
    outputs = ROWS.clone().requires_grad_()
    call = LossCall.of(F.cross_entropy, (outputs, labels(5)), {}, outputs.sum())
    one, many = (call.as_output_loss(torch.tensor(f).double()).row_gradients() for f in (1.0, factor))

    assert_close(many[:, :, None] * many[:, None], factor * one[:, :, None] * one[:, None])


def test_logits_in_half_precision_give_products_in_float32() -> None:
    logits = ROWS.bfloat16().requires_grad_()
    found = LossCall.of(F.cross_entropy, (logits, labels(5)), {}, logits.sum()).as_output_loss(torch.tensor(1.0))
    wide = LossCall.of(F.cross_entropy, (logits.float(), labels(5)), {}, logits.sum()).as_output_loss(torch.tensor(1.0))

    assert found.hessian_product(draw(5, 4).float()).dtype == torch.float32
    assert_close(found.hessian_product(draw(5, 4).float()), wide.hessian_product(draw(5, 4).float()), rtol=0, atol=0)


def test_a_class_that_is_masked_out_has_no_part_in_the_loss() -> None:
    logits = ROWS.clone()
    logits[:, 3] = -torch.inf
    target = labels(5, classes=3)
    found = LossCall.of(F.cross_entropy, (logits.requires_grad_(), target), {}, logits.sum()).as_output_loss(
        torch.tensor(1.0).double()
    )
    rest = LossCall.of(F.cross_entropy, (logits[:, :3], target), {}, logits.sum()).as_output_loss(
        torch.tensor(1.0).double()
    )

    assert_close(found.value(), F.cross_entropy(logits, target).detach())
    assert_close(found.hessian_product(draw(5, 4))[:, :3], rest.hessian_product(draw(5, 4)[:, :3]))


def exotic(outputs: Tensor) -> Tensor:
    return outputs.cosh().log().mean() + outputs.norm()


def test_any_loss_can_be_differentiated_at_captured_outputs() -> None:
    outputs = draw(3, 2, 4).requires_grad_()
    found = Differentiated(outputs, rows_of, 5 * exotic(outputs), 5.0)
    rows = draw(6, 4, seed=7)
    expected = torch.autograd.functional.hvp(
        lambda flat: exotic(flat.view(3, 2, 4)), outputs.detach().view(6, 4), rows
    )[1]

    assert_close(found.value(), exotic(outputs).detach())
    assert_close(found.hessian_product(rows), expected)


def test_a_loss_that_is_linear_has_no_hessian() -> None:
    outputs = draw(3, 4).requires_grad_()
    found = Differentiated(outputs, rows_of, outputs.sum(), 1.0)

    assert_close(found.hessian_product(draw(3, 4)), torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("function", "inputs", "target", "reason"),
    [
        (F.nll_loss, ROWS, labels(5), "not logarithms of probabilities"),
        (F.cross_entropy, ROWS, PROBABILITIES.clone().requires_grad_(), "targets that depend on the parameters"),
        (
            F.binary_cross_entropy_with_logits,
            ROWS[:, :1],
            POSITIVES[:, :1].clone().requires_grad_(),
            "targets that depend",
        ),
    ],
)
def test_what_has_no_closed_form_is_refused(
    function: Callable[..., Tensor], inputs: Tensor, target: Tensor, reason: str
) -> None:
    outputs = inputs.clone().requires_grad_()
    call = LossCall.of(function, (outputs, target), {}, function(outputs, target))

    with pytest.raises(ValueError, match=reason):
        call.as_output_loss(torch.tensor(1.0))
