"""Measurements: what is compared, that what is wrong is not timed, and that memory is true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from densenet_efficient.bench import comparison, tables
from densenet_efficient.bench import steps as benchmarking
from densenet_efficient.bench.accuracy import agreement, check_agreement, largest_difference
from densenet_efficient.bench.comparison import compare, comparison_table
from densenet_efficient.bench.steps import (
    Case,
    MeasurementError,
    TrainingStep,
    check_kernels,
    measure_memory,
    quantiles,
    time_in_turns,
)
from densenet_efficient.bench.tables import environment, markdown_table, write_results
from densenet_efficient.memory.process import allocator_peak_bytes
from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.ops.dispatch import Dispatch

ROOT = Path(__file__).resolve().parents[2]
TINY = NetworkSpec("densenet_cifar", depth=16, growth_rate=8, num_classes=10)
CASE = Case(TINY, 4, 16)
OURS = ("store", "recompute")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ours_agrees_with_the_reference(dtype: str) -> None:
    errors = agreement(Case(TINY, 4, 16, dtype), OURS)
    assert list(errors) == ["eager", *OURS]
    assert 0 < errors["eager"] < (1e-4 if dtype == "fp32" else 1)
    check_agreement(errors)
    assert all(largest_difference(CASE, peer) < 1e-9 for peer in OURS)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeasurementError, match=r"store: expected .* nothing was timed"):
        check_agreement({"eager": 1e-6, "store": 1.3e-6})
    with pytest.raises(MeasurementError, match="store"):
        check_agreement({"eager": 1e-6, "store": float("nan")})
    wrong = {"eager": 1e-6, "store": 1e-3}
    monkeypatch.setattr(comparison, "agreement", lambda case, peers: wrong)
    monkeypatch.setattr(comparison, "time_in_turns", lambda *_: pytest.fail("timed"))
    with pytest.raises(MeasurementError, match="nothing was timed"):
        compare(CASE, ["eager", "store"])


def test_peers_take_turns_and_nobody_is_always_first() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    times = time_in_turns(steps, 3, torch.device("cpu"), inner=2)
    assert "".join(order) == "aabbcc" + "bbccaa" + "ccaabb"
    assert all(len(values) == 3 and min(values) >= 0 for values in times.values())


def test_quantiles() -> None:
    found = quantiles([float(i) for i in range(11)])
    assert found == {"p10": 1.0, "median": 5.0, "p90": 9.0}


def test_the_allocators_peak_is_exact() -> None:
    def step() -> None:
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        torch.ones(500, 1000) + b[:500]

    # b, and the two halves it is added to.
    assert allocator_peak_bytes(step) == pytest.approx(8e6, rel=1e-3)


@pytest.mark.slow
def test_memory_of_a_step_is_measured_in_a_process_of_its_own() -> None:
    case = Case(NetworkSpec("densenet_cifar", depth=40, growth_rate=12), 16, 32)
    eager, ours = (measure_memory(case, peer, exact=True) for peer in ("eager", "recompute"))
    for found in (eager, ours):
        assert 0 < found["kept"] < found["peak"]
        # The process sees what the allocator does, and at most some scratch of its own as well.
        assert found["allocator_peak"] < found["peak"] + 2e6
        assert found["peak"] < 1.1 * found["allocator_peak"] + 16e6
    assert ours["peak"] < eager["peak"] / 3


def test_a_path_that_is_not_the_kernels_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeasurementError, match=r"run on meta in float32, got fallback: no kernels"):
        check_kernels(torch.device("meta"), torch.float32)
    nothing = Dispatch("fallback", "a reason")
    monkeypatch.setattr("densenet_efficient.bench.steps.choose", lambda *_: nothing)
    TrainingStep(CASE, "eager", warm_up=0)
    with pytest.raises(MeasurementError, match="got fallback: a reason; nothing was timed"):
        TrainingStep(CASE, "store")


@pytest.mark.slow
def test_a_measurement_that_fails_says_why() -> None:
    with pytest.raises(MeasurementError, match="input must be at least 4 pixels"):
        measure_memory(Case(TINY, 2, 1), "eager")


def test_a_comparison_and_its_table() -> None:
    rows = compare(CASE, ["eager", "recompute"], rounds=3, memory=False)
    assert [row["peer"] for row in rows] == ["eager", "recompute"]
    assert rows[0]["time_ratio"] == 1 and len(rows[1]["milliseconds"]) == 3
    assert rows[1]["p10"] <= rows[1]["median"] <= rows[1]["p90"]
    lines = comparison_table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"batch": 0}, "batch: expected a positive integer, got 0"),
        ({"image_size": 2.5}, "image_size: expected a positive integer, got 2.5"),
        ({"dtype": "int8"}, "dtype: expected one of fp32, bf16, fp16, got 'int8'"),
    ],
)
def test_cases_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(**{"network": TINY, "batch": 2, "image_size": 8, **fields})
    with pytest.raises(ValueError, match="peers: expected some of eager"):
        compare(CASE, ["fast"])
    with pytest.raises(ValueError, match="graph: expected device cuda"):
        benchmarking.TrainingStep(CASE, "recompute", graph=True)


def test_a_case_survives_the_way_to_another_process() -> None:
    case = Case(TINY, 3, 8, "bf16", channels_last=False)
    assert Case.from_description(json.loads(json.dumps(case.describe()))) == case


def test_results_carry_what_ran_where(tmp_path: Path) -> None:
    path = write_results(tmp_path, "name", "Title", {"value": 1}, "text", "cpu")
    document = json.loads((tmp_path / "name.json").read_text())
    assert document["value"] == 1
    keys = {"command", "device", "torch", "commit", "date", "python", "densenet_efficient"}
    assert keys <= set(document["environment"]) == set(environment("cpu"))
    assert all(f"- {key}: " in path.read_text() for key in keys)


def test_results_of_earlier_runs_are_no_local_changes(tmp_path: Path) -> None:
    """Otherwise the second benchmark of `make bench` could never be one of a clean commit."""
    source, result = tmp_path / "kernel.cpp", tmp_path / "benchmarks" / "results" / "memory.json"
    result.parent.mkdir(parents=True)
    assert tables._commit(tmp_path) == "not in a git repository"
    git = ["git", "-c", "user.name=test", "-c", "user.email=test", "-C", str(tmp_path)]
    for path in (source, result):
        path.write_text("old")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    commit = tables._commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", commit)
    result.write_text("new")
    assert tables._commit(tmp_path) == commit
    source.write_text("new")
    assert tables._commit(tmp_path) == f"{commit} with local changes"


def test_markdown_tables_are_aligned() -> None:
    lines = markdown_table(["a", "b"], [["x", 1], ["long", 22.5]]).splitlines()
    assert lines == ["| a    |    b |", "| ---- | ---: |", "| x    |    1 |", "| long | 22.5 |"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["bench_operators.py", "--batch", "1", "--rounds", "1", "--operators", "channel_stats"],
        ["bench_training.py", "--model", "densenet_cifar", "--depth", "10", "--batch", "2",
         "--dtypes", "fp32", "--rounds", "1", "--no-memory", "--peers", "eager", "recompute"],
    ],
)  # fmt: skip
def test_the_scripts_write_their_tables(tmp_path: Path, command: list[str]) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / command[0]), *command[1:]]
    done = subprocess.run(
        [*script, "--output", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json"}
