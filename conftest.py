"""For all tests, doctests of the package among them."""

import os

# Two pytest workers share two cores. Before torch is imported, so that processes started by tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.typechecks import check_types

# Here because xdist does not hand pytest's own option to its workers.
check_types("lightning_lowrank")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the evidence out unless it is asked for. Not by an option in pyproject.toml, which any `-m` of the user's
    would replace.
    """
    if "evidence" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("evidence")])
        items[:] = [item for item in items if not item.get_closest_marker("evidence")]


@pytest.fixture(autouse=True)
def names_in_doctests(doctest_namespace: dict[str, object]) -> None:
    """What an example in a docstring may use without importing it."""
    from lightning_lowrank import statistics
    from lightning_lowrank.maths.scaling.multifractal import multifractal_spectrum
    from lightning_lowrank.maths.spectra.spectrum import svd
    from lightning_lowrank.maths.spectra.subspaces import top_subspace

    formulas = {name: function for name, function in vars(statistics).items() if callable(function)}
    doctest_namespace |= {"torch": torch, "svd": svd, "top_subspace": top_subspace, "statistics": statistics}
    doctest_namespace |= {"multifractal_spectrum": multifractal_spectrum, **formulas}
