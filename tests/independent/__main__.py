"""Write the tables of `docs/evidence/independent.md`: about a minute on one core."""

from tests.independent import minilm, peers, table
from tests.independent.comparison import comparison
from tests.independent.trainings import CASES, run


def main() -> None:
    """Train the four models, compare, write."""
    comparisons = {name: comparison(run(name)) for name in CASES}
    unknown = {name: found.unknown for name, found in comparisons.items() if found.unknown}
    if unknown:
        raise SystemExit(f"neither reference nor reason: {unknown}")
    two, three, count = table.shares(comparisons)
    off = f"Of {count:,} numbers with a reported error, {two:.0%} are within two errors and {three:.0%} within three."
    parts = {"quantities": table.table(comparisons), "errors": f"{off} None is beyond six."}
    parts |= {"reasons": table.reasons(), "matrices": table.of_matrices(minilm.rows())}
    # Where no other tool is installed their table stays as it is.
    others = peers.peers(run("ConvNeXt"))
    table.write(parts | ({"peers": table.of_peers(others)} if others else {}))


if __name__ == "__main__":
    main()
