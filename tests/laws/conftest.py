"""What the laws share: a statistic that a contributor has just written."""

import importlib.util

import pytest

from lightning_lowrank.statistics.registry import REGISTERED

NEW = '''
from lightning_lowrank.statistics.registry import statistic
from lightning_lowrank.maths.spectra.spectrum import Spectrum


@statistic(unit="directions", parameter="threshold", domain=(0.0, 1.0), tail=lambda threshold: threshold < 0.1)
def values_above(spectrum: Spectrum, *, threshold: float = 0.5):
    """Number of singular values above a part of the largest one."""
    return (spectrum.weights * (spectrum.unit > threshold)).sum(-1)
'''


@pytest.fixture
def added(tmp_path):
    """A statistic in a file of its own, as a contributor writes it."""
    path = tmp_path / "values_above.py"
    path.write_text(NEW)
    spec = importlib.util.spec_from_file_location("values_above", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.values_above
    del REGISTERED["values_above"]
