"""The page of evidence, written from the runs."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tests.independent.comparison import OF_DRAWS, REASONS, Claim, Compared, Comparison, claim_of
from tests.independent.minilm import Row
from tests.independent.multifractal import Drawn
from tests.independent.peers import Peer

PAGE = Path("docs/evidence/independent.md")
BEGIN, END = "<!-- begin of the table of {} -->", "<!-- end of the table of {} -->"

# Names of which one row stands for several.
GROUPS = (
    (r"^(gradient|update|displacement)_in_top", "<move>_in_top"),
    (r"^(gradient|weight|update|displacement|(first|second)_moment|(centred_|validation_)?feature)_", "<source>_"),
    (r"^(hessian|gauss_newton|empirical_fisher)_", "<operator>_"),
    (r"^concentration_(module|head|neuron|direction)_(gradient|update|gate)_", "concentration_<unit>_<signal>_"),
    (r"^concentration_(module|head|neuron|direction)_count", "concentration_<unit>_count"),
    (r"^(concentration_<unit>.*)_start$", r"\1"),
    (r"(lambda|label_energy|time_constant)_\d$", r"\1_<k>"),
    (r"_(0\.1|0\.5)$", "_<density>"),
)


def row_of(quantity: str) -> str:
    """The row that a quantity stands in."""
    for pattern, name in GROUPS:
        if not (pattern.startswith("_(0") and not quantity.startswith("concentration_mask")):
            quantity = re.sub(pattern, name, quantity)
    return quantity


def table(comparisons: dict[str, Comparison]) -> str:
    """One row for each kind of quantity and way to compare it."""
    rows: dict[tuple[str, Claim], dict[str, list[Compared]]] = defaultdict(lambda: defaultdict(list))
    for model, comparison in comparisons.items():
        for one in comparison.compared:
            rows[row_of(one.quantity), claim_of(one.quantity)][model].append(one)
    lines = [
        "| quantity | reference | models | numbers | worst deviation | tolerance |",
        "|---|---|---|---|---|---|",
    ]
    for (name, claim), by_model in sorted(rows.items(), key=lambda item: item[0][0]):
        numbers = [one for some in by_model.values() for one in some if one.is_number]
        models = ", ".join(model for model, some in by_model.items() if any(one.is_number for one in some))
        claim = (
            Claim(claim.reference, OF_DRAWS, "draws") if any(isinstance(one.truth, Drawn) for one in numbers) else claim
        )
        worst = max((one.deviation for one in numbers), default=math.nan)
        lines.append(f"| `{name}` | {claim.reference} | {models} | {len(numbers):,} | {worst:.1e} | {claim} |")
    return "\n".join(lines)


def shares(comparisons: dict[str, Comparison]) -> tuple[float, float, int]:
    """Of numbers that come with errors, how many are within two and three of these."""
    off = [one.deviation for c in comparisons.values() for one in c.compared if one.has_error]
    return sum(d <= 2 for d in off) / len(off), sum(d <= 3 for d in off) / len(off), len(off)


def reasons() -> str:
    """Quantities and tags without a reference."""
    lines = ["| what | why there is no reference |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {reason} |" for name, reason in REASONS.items())])


def of_matrices(rows: Iterable[Row]) -> str:
    """Of a real model's matrices."""
    lines = ["| quantity | reference | matrices | worst deviation |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| `{r.name}` | {r.reference} | {r.matrices} | {r.worst:.1e} |" for r in rows)])


def of_peers(found: Iterable[Peer]) -> str:
    """Numbers of other tools."""
    lines = ["| quantity | tool | the tool's number | logged | reported error |", "|---|---|---|---|---|"]
    rows = (f"| `{p.quantity}` | {p.tool} | {p.theirs:.6g} | {p.logged:.6g} | {p.error:.2g} |" for p in found)
    return "\n".join([*lines, *rows])


def write(parts: dict[str, str]) -> None:
    """Put each part between its marks."""
    text = PAGE.read_text()
    for name, part in parts.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{part}\n\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text)
