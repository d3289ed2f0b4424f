"""`train` killed, interrupted and out of space: resumed, its end is the uninterrupted run's. A few
of what `make faults` does in large numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tools.faults.kinds import KILLS, OTHERS, SMALL_DISK

# In a process of its own: one that has run a backward pass cannot fork runs that do.
CODE = """if True:
    import json, sys
    from tools.faults import campaign, runs

    runs.warm_up()
    runs_ = campaign.Campaign(0, variants=[("--memory", "store", "--ema-decay", "0.9")])
    for kind in sys.argv[1:]:
        runs_.several(kind, 1)
    runs_.close()
    print(json.dumps([runs_.faults, runs_.failures]))
"""
KINDS = [kind for kind in (*KILLS, *OTHERS) if kind != SMALL_DISK]  # which takes a mount


@pytest.fixture(scope="module")
def outcome() -> Any:
    """Faults met, by kind, and failures."""
    command = [sys.executable, "-c", CODE, *KINDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_meets_faults_ends_as_if_it_had_not(outcome: Any, kind: str) -> None:
    faults, failures = outcome
    assert not failures
    assert faults[kind] >= 1
