"""Write the table of README.md from the stored results of a clean commit.

    python benchmarks/readme_table.py            rewrite the table between the markers
    python benchmarks/readme_table.py --check    fail where it is not what the results say

Reads benchmarks/results/memory-cpu.json and training-cpu.json. Fails where either was measured with
local changes, outside a repository, or both at different commits.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from densenet_efficient.bench.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- table: benchmarks/readme_table.py -->", "<!-- end of table -->"
LABELS = {
    "eager": "torchvision",
    "checkpoint": "torchvision, `memory_efficient=True`",
    "store": 'ours, `memory="store"`',
    "auto": 'ours, `memory="auto"`, the default',
    "recompute": 'ours, `memory="recompute"`',
}


def read(path: Path) -> dict[str, Any]:
    """Stored results. SystemExit where they cannot be traced to a commit."""
    document = json.loads(path.read_text())
    commit = document["environment"]["commit"]
    if " " in commit:
        sys.exit(f"readme_table: {path.name}: expected results of a clean commit, got {commit!r}")
    return document


def table(memory: dict[str, Any], training: dict[str, Any]) -> str:
    """DenseNet-121 at 224 px: memory of the largest batch, time in fp32 and bf16."""
    part = memory["table"]
    times = {
        entry["case"]["dtype"]: (entry["case"], {row["peer"]: row for row in entry["peers"]})
        for entry in training["cases"]
    }
    columns = ["DenseNet-121, 224 px"]
    columns.append(f"peak memory, batch {part['case']['batch']}, {part['case']['dtype']}")
    columns.append("of torchvision")
    columns += [f"time, batch {case['batch']}, {dtype}" for dtype, (case, _) in times.items()]
    rows = []
    for row in part["rows"]:
        cells = [LABELS[row["peer"]], f"{row['peak'] / 1e6:,.0f} MB"]
        cells.append(f"{row['peak'] / part['rows'][0]['peak']:.3f}")
        for _, peers in times.values():
            found = peers[row["peer"]]
            cells.append(f"{found['median']:.0f} ms ({found['time_ratio']:.2f})")
        rows.append(cells)
    return markdown_table(columns, rows)


def replaced(text: str, content: str) -> str:
    """The page with the content between its markers. SystemExit where they are missing."""
    before, found, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not found or not end:
        sys.exit(f"readme_table: expected {BEGIN} and {END} in README.md, got neither or one")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; compare")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args()
    memory, training = (read(options.results / f"{n}-cpu.json") for n in ("memory", "training"))
    commits = [document["environment"]["commit"] for document in (memory, training)]
    if commits[0] != commits[1]:
        sys.exit(f"readme_table: expected both results of one commit, got {' and '.join(commits)}")
    old = options.readme.read_text()
    new = replaced(old, table(memory, training))
    if options.check:
        if new != old:
            sys.exit("readme_table: README.md differs from the results; run it without --check")
        return 0
    options.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
