"""Trainings that are wrong from the first step on, beside those of `benchmarks.faults`."""

import torch
from torch import nn

from benchmarks.faults.nets import mlp
from benchmarks.faults.trainings import LONG, Case, Run, classes

# Share of the labels that are drawn anew, once for the whole run.
NOISE = 0.4
# A thousandth of what the healthy run has.
SMALL = 1e-6
# Of the 64 units of the first layer, and the bias that no digit overcomes.
DEAD, BIAS = 60, -10.0


def noisy() -> Run:
    """Many labels are wrong."""
    run = Run(mlp(), classes)
    labels = run.data.tensors[1]
    is_wrong = torch.rand(labels.shape) < NOISE
    run.data.tensors = (run.data.tensors[0], torch.where(is_wrong, torch.randint(10, labels.shape), labels))
    return run


def slow() -> Run:
    """Nothing is learnt in any time."""
    return Run(mlp(), classes, rate=SMALL)


def dead() -> Run:
    """Most units of the first layer are below zero for all inputs."""
    run = Run(mlp(), classes)
    first = run.net.get_submodule("0")
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.bias[:DEAD] = BIAS
    return run


PLANTED = [
    Case("digits MLP, label noise", noisy, "digits MLP", LONG),
    Case("digits MLP, rate too small", slow, "digits MLP", LONG),
    Case("digits MLP, dead ReLU", dead, "digits MLP", LONG),
]
