"""The house: where a module of the package may import from, and how large a file may be."""

from __future__ import annotations

import ast
import importlib
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "densenet_efficient"

# From the bottom to the top. A module imports from lower subpackages only, or from its own; the
# modules at the top of the package are below all subpackages.
LAYERS: list[set[str]] = [
    {""},
    {"ops"},
    {"core"},
    {"nn"},
    {"reference"},
    {"models", "conversion", "memory"},
    {"report", "bench", "train"},
    {"cli"},
]
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# The public names and the command, which gather what the subpackages offer.
ENTRIES = {"__init__.py", "__main__.py"}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imported_rooms(path: Path) -> set[str]:
    """The subpackages that a module imports from, wherever in its text."""
    subpackages = set()
    package = ("densenet_efficient", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        for name in names:
            if name[0] == "densenet_efficient" and len(name) > 1:
                subpackages.add(name[1] if name[1] in RANKS else "")
    return subpackages


def modules() -> list[Path]:
    return [
        p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.name not in ENTRIES
    ]


def test_every_room_has_its_layer() -> None:
    subpackages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert subpackages == set(RANKS) - {""}


def test_imports_point_downwards() -> None:
    upwards = [
        f"{path.relative_to(PACKAGE)} imports from {other or 'the top'}"
        for path in modules()
        for other in sorted(imported_rooms(path) - {room_of(path)})
        if RANKS[other] >= RANKS[room_of(path)]
    ]
    assert not upwards, "\n".join(upwards)


def test_the_top_of_the_package_is_a_short_list() -> None:
    entries = [
        path.name
        for path in PACKAGE.iterdir()
        if not path.is_dir() and not path.name.endswith(".so")
    ]
    assert len(entries) <= 10, sorted(entries)


def test_no_function_hides_a_module_of_its_name() -> None:
    hidden = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] in ("__init__", "__main__"):
            continue
        parent = importlib.import_module(".".join(parts[:-1]))
        value = getattr(parent, parts[-1], None)
        if value is not None and not isinstance(value, types.ModuleType):
            hidden.append(f"{'.'.join(parts)} is hidden by {value!r}")
    assert not hidden, "\n".join(hidden)


@pytest.mark.parametrize(
    ("folders", "endings", "budget"),
    [
        (
            ["densenet_efficient", "tests", "tools", "benchmarks", "build_backend", "examples"],
            {".py"},
            350,
        ),
        (["csrc"], {".cpp", ".h", ".cu", ".cuh"}, 400),
    ],
)
def test_files_stay_within_their_budget(folders: list[str], endings: set[str], budget: int) -> None:
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in endings
    }
    assert sizes
    assert not {name: lines for name, lines in sizes.items() if lines > budget}


def test_tests_import_neither_tests_nor_the_peer_past_its_home() -> None:
    """Helpers live in tests/support, and what needs torchvision is skipped where it is missing."""
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                found = [node.module or ""]
            for name in found:
                foreign = name.startswith("tests.") and not name.startswith("tests.support")
                if foreign or name.split(".")[0] == "torchvision":
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)
