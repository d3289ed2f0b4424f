"""The CPU kernels that a build holds: which are chosen, and that each gives the right results.

A build from sources holds one variant, a wheel several (docs/installing.md); all of them that the
processor can run are tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from densenet_efficient.ops import build_info, cpu_variants, library
from densenet_efficient.ops.library import MissingLibraryError
from tools import smoke

LEVELS = {"first": "sse4_2", "second": "sse4_2 avx2", "third": "sse4_2 avx2 avx512f"}


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A build of three variants, and the file that says what the processor has."""
    built = {
        **build_info.build_info(),
        "march": " ".join(LEVELS),
        "cpu_features": "; ".join(LEVELS.values()),
    }
    monkeypatch.setattr(cpu_variants, "build_info", lambda: built)
    monkeypatch.setattr(cpu_variants, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.delenv("DENSENET_EFFICIENT_CPU", raising=False)
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        ("fpu sse4_2", "first"),
        ("fpu avx2 sse4_2 fma", "second"),
        ("sse4_2 avx2 avx512f amx_tile", "third"),
        ("sse4_2 avx512f", "first"),  # a virtual machine that hides a part
    ],
)
def test_the_last_variant_that_the_processor_can_run_is_chosen(
    levels: Path, present: str, chosen: str
) -> None:
    levels.write_text(f"processor\t: 0\nflags\t\t: {present}\n")
    assert cpu_variants.choose_variant() == chosen


def test_the_least_demanding_is_chosen_where_nothing_is_known(levels: Path) -> None:
    assert cpu_variants.choose_variant() == "first"


def test_a_processor_that_can_run_none_is_told_what_it_lacks(levels: Path) -> None:
    levels.write_text("flags\t\t: fpu\n")
    with pytest.raises(MissingLibraryError, match=r"machine lacks: sse4_2 \(built with -march=fir"):
        cpu_variants.choose_variant()


def test_the_environment_chooses_another(levels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels.write_text("flags\t\t: sse4_2 avx2\n")
    monkeypatch.setenv("DENSENET_EFFICIENT_CPU", "first")
    assert cpu_variants.choose_variant() == "first"
    monkeypatch.setenv("DENSENET_EFFICIENT_CPU", "third")
    with pytest.raises(
        MissingLibraryError, match=r"machine lacks: avx512f \(built with -march=thi"
    ):
        cpu_variants.choose_variant()
    monkeypatch.setenv("DENSENET_EFFICIENT_CPU", "fifth")
    with pytest.raises(MissingLibraryError, match=r"fifth names .* first, second, third\."):
        cpu_variants.choose_variant()


def runnable() -> list[str]:
    present = cpu_variants.processor_features()
    return [
        name
        for name, needed in cpu_variants.compiled_variants().items()
        if present is None or present.issuperset(needed)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", runnable())
def test_every_variant_that_was_compiled_is_right(name: str) -> None:
    """A step of a block in each dtype next to the reference, in a process of its own."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "tools" / "smoke.py")],
        env={**os.environ, "DENSENET_EFFICIENT_CPU": name, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"CPU kernels {name}: right" in done.stdout


def test_a_package_of_which_no_variant_can_be_tried_does_not_pass(
    levels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels.write_text("flags\t\t: fpu\n")
    # What it says of the variant that this process has loaded, which is none of these.
    monkeypatch.setattr(smoke.densenet_efficient, "info", lambda: "")
    assert smoke.main() == 1


def test_missing_kernels_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_failure", None)
    monkeypatch.setattr(cpu_variants, "variant_path", lambda name: tmp_path / f"{name}.so")
    with pytest.raises(MissingLibraryError, match=rf"{tmp_path}.*\.so does not exist\. Build them"):
        library.load()


def test_the_libraries_know_nothing_of_python() -> None:
    """So that one build of them serves every Python."""
    for path in (library.LIBRARY, *map(cpu_variants.variant_path, runnable())):
        listed = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True)
        symbols = {line.split()[-1] for line in listed.stdout.splitlines()}
        assert not {name for name in symbols if name.startswith(("Py", "_Py"))}, path
