"""What the tab draws of a scaling: oracles are numpy's fits and histograms."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_lowrank.maths.scaling.by_rank import rank_scaling
from lightning_lowrank.maths.scaling.multifractal import multifractal_spectrum
from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.monitors.multifractal.curves import CELLS, DRAWN, POINTS, curves, vectors
from tests import scalings

SCALINGS = {
    "rank": lambda: rank_scaling(scalings.jittered(96, 128, spread=0.2)),
    "no spectrum": lambda: rank_scaling(scalings.jittered(256, 256, spread=0.8)),
    "neuromfa": lambda: multifractal_spectrum([0.05 * scalings.jittered(96, 128, spread=0.2)], "neuromfa"),
}
every_scaling = pytest.mark.parametrize("kind", SCALINGS)


def drawn(scaling: Scaling) -> dict[str, torch.Tensor]:
    return {name.removeprefix("a_"): row for name, row in vectors("a", scaling).items()}


def fitted(scaling: Scaling) -> tuple[np.ndarray, np.ndarray]:
    """Abscissa and masses at the radii that fits read."""
    read = scaling.fit.bool()
    return scaling.abscissa[read].numpy(), scaling.masses[:, read].numpy()


@every_scaling
def test_lines_are_numpys_fits(kind):
    scaling = SCALINGS[kind]()
    x, masses = fitted(scaling)
    masses = masses[masses[:, 0] > 0]
    largest = masses[:, -1:] if scaling.per_node else masses[:, -1].mean()
    found = drawn(scaling)

    ends = found["log_radius"][[0, -1]].numpy()
    expected = [np.polyval(np.polyfit(x, np.log(((masses / largest) ** q).sum(0)), 1), ends) for q in DRAWN]
    assert_close(found["log_partition_fit"].view(-1, 2).numpy(), np.stack(expected), rtol=1e-9, atol=1e-9)


@every_scaling
def test_points_are_radii_of_the_fit_from_the_first_to_the_last(kind):
    scaling = SCALINGS[kind]()
    x, _ = fitted(scaling)
    found = drawn(scaling)

    radii, points = found["log_radius"].numpy(), found["log_partition"].view(-1, POINTS)
    assert (radii[0], radii[-1]) == (x.min(), x.max()) and set(radii) <= set(x)
    places = [int(np.flatnonzero(scaling.abscissa.numpy() == radius)[0]) for radius in radii]
    assert_close(points, scaling.log_partition[[scaling.orders.index(q) for q in DRAWN]][:, places], rtol=0, atol=0)


def test_in_rank_mode_all_radii_are_points():
    found = drawn(SCALINGS["rank"]())

    assert len(set(found["log_radius"].tolist())) >= POINTS - 2


@every_scaling
def test_dimensions_of_neurons_are_numpys_slopes(kind):
    scaling = SCALINGS[kind]()
    x, masses = fitted(scaling)

    expected = [np.polyfit(x, np.log(row), 1)[0] if row[0] else np.nan for row in masses]
    assert_close(scaling.node_dimensions.numpy(), np.array(expected), rtol=1e-9, atol=1e-9, equal_nan=True)


def test_neurons_of_a_cascade_have_the_dimensions_of_their_boxes():
    """Masses of one exponent: all neurons have it."""
    scaling = scalings.cascade((1, 1), 3, 6)

    assert_close(
        scaling.node_dimensions, torch.full_like(scaling.node_dimensions, np.log(2) / np.log(3)), rtol=0, atol=1e-10
    )


@every_scaling
def test_the_histogram_is_numpys(kind):
    dimensions = SCALINGS[kind]().node_dimensions.numpy()
    found = drawn(SCALINGS[kind]())

    known = dimensions[np.isfinite(dimensions)]
    counts, edges = np.histogram(known, CELLS)
    assert_close(found["neuron_dimension_counts"].numpy(), counts.astype(float))
    assert_close(found["neuron_dimension"].numpy(), (edges[1:] + edges[:-1]) / 2)
    assert_close(found["neuron_dimension_density"].numpy(), np.histogram(known, CELLS, density=True)[0])


def test_neurons_that_are_all_alike_are_in_one_cell():
    found = drawn(scalings.cascade((1, 1), 3, 6))

    assert sorted(found["neuron_dimension_counts"].tolist())[-1] == 64 and bool(
        torch.isfinite(found["neuron_dimension_density"]).all()
    )


def test_what_has_no_spectrum_has_its_partition_function_all_the_same():
    """By which one sees why."""
    found = drawn(SCALINGS["no spectrum"]())

    assert bool(found["f"].isnan().all()) and bool(torch.isfinite(found["log_partition"]).all())


@pytest.mark.parametrize("weights", [torch.ones(64, 64), torch.zeros(64, 64), torch.full((64, 64), torch.nan)])
def test_without_radii_nothing_is_drawn(weights):
    assert all(bool(row.isnan().all()) for row in vectors("a", rank_scaling(weights)).values())


def test_a_batch_is_one_by_one():
    batch = torch.stack(
        [
            scalings.jittered(64, 96, spread=0.1, seed=0),
            torch.ones(64, 96),
            scalings.jittered(64, 96, spread=0.1, seed=1),
        ]
    )
    found = vectors("a", rank_scaling(batch))

    for i, weights in enumerate(batch):
        assert_close({name: row[i] for name, row in found.items()}, vectors("a", rank_scaling(weights)), equal_nan=True)


def test_every_curve_has_its_vector():
    found, declared = vectors("a", SCALINGS["rank"]()), curves("a", histogram=True)

    assert {curve.name: len(curve.axis) for curve in declared} == {name: row.shape[-1] for name, row in found.items()}
