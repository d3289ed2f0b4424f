"""--json: one document on stdout, with the figures that the tables show."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from densenet_efficient import info
from densenet_efficient.cli.main import main
from densenet_efficient.cli.parser import print_json

SMALL = ["--model", "densenet_cifar", "--depth", "10", "--growth-rate", "4", "--batch", "2"]


def document(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan = document(["plan", *SMALL, "--budget", "10MB"], capsys)
    assert plan["batch"] == 2 and plan["network"]["depth"] == 10 and plan["memory"] == "auto"
    assert 0 < plan["kept_bytes"] < plan["peak_bytes"] < 10e6 and plan["largest_batch"] > 2
    kept = [row["bytes"] for row in plan["rows"] if row["lifetime"] in ("kept", "output")]
    assert sum(kept) == plan["kept_bytes"]
    assert plan["images_bytes"] == 2 * (3 * 32 * 32 * 4 + 8)
    inference = document(["plan", *SMALL, "--inference"], capsys)
    assert inference["peak_bytes"] < plan["peak_bytes"] and inference["largest_batch"] is None


def test_explain_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    modules = document(["explain", *SMALL], capsys)["modules"]
    assert "features.denseblock1" in [row["module"] for row in modules]
    assert all(row["path"] in ("kernels", "fallback", "original") for row in modules)
    found = document(["info"], capsys)
    assert found["version"] == info().version and found["devices"][0]["name"] == "cpu"


@pytest.mark.slow
def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", *SMALL, "--rounds", "1", "--peers", "recompute"]
    found = document(command, capsys)
    assert found["environment"]["torch"] and found["dtype"] == "fp32"
    (row,) = found["peers"]
    assert row["peer"] == "recompute" and row["median"] > 0 and row["peak"] > 0


def test_what_json_cannot_hold_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": (math.nan, 1.5), "b": None})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": None}
