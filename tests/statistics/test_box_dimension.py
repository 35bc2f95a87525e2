"""Oracle: the number of boxes of a cascade, which doubles at every level."""

import numpy as np
import pytest
from torch.testing import assert_close

from lightning_lowrank.statistics import box_dimension
from tests import scalings


@pytest.mark.parametrize("cascade", scalings.CASCADES)
def test_counts_boxes(cascade):
    assert_close(
        box_dimension(scalings.cascade(*cascade)).item(), float(np.log(2) / np.log(cascade[1])), rtol=0, atol=1e-10
    )
