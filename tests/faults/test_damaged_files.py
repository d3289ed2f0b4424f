"""Damaged, foreign and malicious files: refused by name, not executed, nothing changed."""

from __future__ import annotations

import random

import pytest

from tools.faults.damage import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("damaged"))


@pytest.mark.slow
def test_cut_off_anywhere_and_single_wrong_bytes(bench: Bench) -> None:
    bench.bytes_wrong(50, random.Random(0))
    assert not bench.problems


def test_foreign_and_malicious_files(bench: Bench) -> None:
    bench.foreign()
    assert not bench.problems
