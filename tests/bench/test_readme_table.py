"""README's table: written from stored results of one clean commit, and from no others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import readme_table

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("eager", "checkpoint", "store", "recompute")


def run(folder: Path, commits: tuple[str, str], *arguments: str) -> int | str | None:
    """What the script exits with: 0, or why it refuses."""
    rows = [{"peer": peer, "peak": 2e9 / (i + 1)} for i, peer in enumerate(PEERS)]
    memory = {"table": {"case": {"batch": 16, "dtype": "fp32"}, "rows": rows}}
    steps = [{"peer": p, "median": 500.0 - i, "time_ratio": 1.0} for i, p in enumerate(PEERS)]
    cases = [{"case": {"batch": 8, "dtype": dtype}, "peers": steps} for dtype in ("fp32", "bf16")]
    for name, content, commit in zip(
        ("memory", "training"), (memory, {"cases": cases}), commits, strict=True
    ):
        document = {"environment": {"commit": commit}, **content}
        (folder / f"{name}-cpu.json").write_text(json.dumps(document))
    readme = folder / "README.md"
    if not readme.exists():
        begin, _, rest = (ROOT / "README.md").read_text().partition("<!-- table")
        readme.write_text(f"{begin}<!-- table{rest}")
    words = ["readme_table.py", *arguments, "--results", str(folder), "--readme", str(readme)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        try:
            return readme_table.main()
        except SystemExit as refusal:
            return refusal.code


def test_it_writes_the_table_between_the_markers(tmp_path: Path) -> None:
    commits = ("0123456789ab", "0123456789ab")
    assert "README.md differs" in str(run(tmp_path, commits, "--check"))
    assert run(tmp_path, commits) == 0
    text = (tmp_path / "README.md").read_text()
    assert "2,000 MB" in text and "0.500" in text and "497 ms (1.00)" in text
    assert text.count("| DenseNet-121, 224 px") == 1 and "## Use" in text
    assert run(tmp_path, commits, "--check") == 0


@pytest.mark.parametrize(
    "commits, message",
    [
        (("0123456789ab with local changes", "0123456789ab"), "expected results of a clean commit"),
        (("0123456789ab", "not in a git repository"), "training-cpu.json: expected results"),
        (("0123456789ab", "ba9876543210"), "expected both results of one commit"),
    ],
)
def test_results_without_a_clean_commit_are_refused(
    tmp_path: Path, commits: tuple[str, str], message: str
) -> None:
    assert message in str(run(tmp_path, commits))
