"""Names of all statistics that there are, with parameters and in relative form."""

from lightning_lowrank.maths.scaling.scaling import Scaling
from lightning_lowrank.statistics.registry import REGISTERED, find

PARAMETERS = {"epsilon": (0.01, 0.5), "p": (0.5, 1, 1.5, 2)}


def names():
    """Every statistic of spectra and subspaces, with parameters, and the relative form of each that has one."""
    of_matrices = {n: s for n, s in REGISTERED.items() if Scaling not in s.takes}
    plain = [
        *of_matrices,
        *(f"{n}_{value}" for n, s in of_matrices.items() for value in PARAMETERS.get(s.parameter, ())),
    ]
    return sorted(plain + [f"relative_{n}" for n in plain if find(n).comparable])
