"""The build: what it finds, what it says where something is missing, and what ninja does again."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backend() -> Iterator[None]:
    """Makes the modules of the build importable."""
    folder = str(ROOT / "build_backend")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture
def toolchain(backend: None) -> ModuleType:
    return importlib.import_module("toolchain")


@pytest.fixture
def native(backend: None) -> ModuleType:
    return importlib.import_module("native")


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# --- what is found, and the message where it is not ---------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "ptx"),
    [
        ("8.0+PTX;9.0a", ("80", "90a"), ("80",)),
        ("8.0;8.6;9.0a;10.0;12.0;12.0+PTX", ("80", "86", "90a", "100", "120"), ("120",)),
        ("7.0 7.5 8.0 9.0+PTX", ("80", "90a"), ("90",)),  # containers set lists like this one
        ("8.9,10.3f", ("89", "103f"), ()),
    ],
)
def test_architecture_lists(
    toolchain: ModuleType, text: str, code: tuple[str, ...], ptx: tuple[str, ...]
) -> None:
    archs = toolchain.parse_cuda_archs(text)
    assert (archs.code, archs.ptx) == (code, ptx)


def test_hopper_is_compiled_for_its_own_instructions(toolchain: ModuleType) -> None:
    flags = toolchain.parse_cuda_archs("9.0").flags()
    assert flags == ["-gencode=arch=compute_90a,code=sm_90a"]


@pytest.mark.parametrize(
    ("text", "message"), [("Hopper", "has 'Hopper'"), ("7.5", "need at least 8.0")]
)
def test_odd_architecture_lists_are_refused(toolchain: ModuleType, text: str, message: str) -> None:
    with pytest.raises(toolchain.BuildError, match=message):
        toolchain.parse_cuda_archs(text)


def test_torch_is_found_from_an_isolated_environment(tmp_path: Path) -> None:
    # pip isolates a build by PYTHONPATH and a sitecustomize that takes site-packages off sys.path.
    (tmp_path / "sitecustomize.py").write_text(
        "import site, sys\n"
        "hidden = set(site.getsitepackages())\n"
        "sys.path[:] = [p for p in sys.path if p not in hidden]\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'build_backend')!r})\n"
        "import importlib.util, toolchain\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "print(toolchain.find_torch().version)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    import torch

    assert done.stdout.strip() == torch.__version__, done.stderr


def test_missing_torch_says_what_to_do(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(toolchain, "search_path", lambda: [str(tmp_path)])
    with pytest.raises(toolchain.BuildError, match=r"Install torch >= 2\.10 there first"):
        toolchain.find_torch()


def test_old_torch_is_named(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch" / "include").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    monkeypatch.setenv("DENSENET_EFFICIENT_TORCH", str(tmp_path))
    with pytest.raises(toolchain.BuildError, match=r"needs torch >= 2\.10.* is torch 2\.9\.1\+cpu"):
        toolchain.find_torch()


def test_missing_compiler_says_what_to_install(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(toolchain.BuildError, match=r"g\+\+, clang\+\+ and c\+\+ cannot be found"):
        toolchain.find_compiler()


def test_compiler_without_cxx20_is_refused(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = executable(tmp_path / "old-g++", 'echo "unrecognized option" >&2; exit 1')
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(toolchain.BuildError, match=r"refuses -std=c\+\+20.*unrecognized option"):
        toolchain.find_compiler()


def test_missing_ninja_says_what_to_install(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)  # type: ignore[arg-type]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(toolchain.BuildError, match="pip install ninja"):
        toolchain.find_ninja()


def test_march_decides_the_recorded_features(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("x86-64-v3 is a level of x86-64")
    monkeypatch.setenv("DENSENET_EFFICIENT_MARCH", "x86-64-v3")
    features = toolchain.find_compiler().features
    assert {"avx2", "fma"} <= set(features) and "avx512f" not in features
    monkeypatch.setenv("DENSENET_EFFICIENT_MARCH", "none")
    assert "avx2" not in toolchain.find_compiler().features


# --- ninja, on a project of three small files ---------------------------------------------------


@pytest.fixture
def project(native: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A tree with one host source, one CUDA source and a module, and an nvcc under test control."""
    root = tmp_path / "a project"  # a space in the path must not matter
    for folder in ("csrc/cpu", "csrc/cuda", "build_backend"):
        (root / folder).mkdir(parents=True)
    (root / "csrc/value.h").write_text("constexpr int value = 1;\n")
    (root / "csrc/ops.cpp").write_text('#include "value.h"\nint ops() { return value; }\n')
    (root / "csrc/cpu/stage.cpp").write_text("int stage() { return 2; }\n")
    (root / "csrc/cuda/stage.cu").write_text("int stage_cuda() { return 3; }\n")
    (root / "csrc/module.cpp").write_text(
        'const char* info[][2] = {\n#include "build_info.h"\n};\n'
    )
    wrapper = ROOT / "build_backend" / "nvcc.py"
    (root / "build_backend/nvcc.py").write_text(wrapper.read_text())
    for name in ("CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "DENSENET_EFFICIENT_CUDA", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    yield root


def fake_nvcc(folder: Path, compile_command: str) -> None:
    """An nvcc that reports a version, compiles by a shell command and links with the host compiler.

    The command sees the arguments; $output is the object and $source the .cu file.
    """
    executable(
        folder / "cuda/bin/nvcc",
        f"""
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;;
  *" -c "*) while [ $# -gt 0 ]; do
      case "$1" in -c) source="$2";; -o) output="$2";; esac; shift; done
    {compile_command};;
  *) objects=""; while [ $# -gt 0 ]; do
      case "$1" in -o) output="$2"; shift;; *.o) objects="$objects '$1'";; esac; shift; done
    eval g++ -shared $objects -o "'$output'";;
esac""",
    )


COMPILE = 'g++ -fPIC -x c++ -c "$source" -o "$output"'


def recorded(root: Path) -> str:
    return (root / "build/native/build_info.h").read_text()


def test_cuda_sources_are_compiled_and_reported(
    native: ModuleType, project: Path, tmp_path: Path
) -> None:
    report = "ptxas info    : Used 40 registers, used 1 barriers"
    fake_nvcc(tmp_path, f'echo "{report}"; {COMPILE}')
    built = native.build(project, "1.2.3")
    symbols = subprocess.run(["nm", built.library], capture_output=True, text=True).stdout
    assert "stage_cuda" in symbols and "ops" in symbols
    assert (project / "build/native/cuda/stage.cu.o.ptxas").read_text().strip() == report
    text = recorded(project)
    assert '{"version", "1.2.3"}' in text and '{"cuda", "compiled"}' in text
    assert '{"cuda_archs", "80 90a"}' in text and '{"nvcc", "13.0.88"}' in text


def test_only_what_changed_is_built_again(
    native: ModuleType, project: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake_nvcc(tmp_path, COMPILE)
    native.build(project, "1")
    capfd.readouterr()
    native.build(project, "1")
    assert "C++" not in capfd.readouterr().out
    header = project / "csrc/value.h"
    header.write_text("constexpr int value = 5;\n")
    later = header.stat().st_mtime + 2  # file systems with coarse clocks
    os.utime(header, (later, later))
    native.build(project, "1")
    output = capfd.readouterr().out
    assert "ops.cpp" in output and "stage.cpp" not in output and "nvcc" not in output


def test_failing_cuda_warns_and_builds_for_the_cpu(
    native: ModuleType, project: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake_nvcc(tmp_path, 'echo "stage.cu(1): error: no" >&2; exit 2')
    built = native.build(project, "1")
    captured = capfd.readouterr()
    assert "WARNING: the CUDA kernels failed to compile" in captured.err
    assert "stage.cu(1): error: no" in captured.out
    assert (
        "stage_cuda"
        not in subprocess.run(["nm", built.library], capture_output=True, text=True).stdout
    )
    assert '{"cuda", "left out (nvcc 13.0.88 failed to compile them)"}' in recorded(project)


def test_cuda_can_be_demanded_and_refused(
    native: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path, "exit 2")
    monkeypatch.setenv("DENSENET_EFFICIENT_CUDA", "1")
    with pytest.raises(SystemExit, match="CUDA kernels failed to compile"):
        native.build(project, "1")
    monkeypatch.setattr(native.toolchain, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match="nvcc was not found"):
        native.build(project, "1")
    monkeypatch.setenv("DENSENET_EFFICIENT_CUDA", "0")
    native.build(project, "1")
    assert "left out (DENSENET_EFFICIENT_CUDA=0)" in recorded(project)
    monkeypatch.setenv("DENSENET_EFFICIENT_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1, got 'yes'"):
        native.build(project, "1")


def test_serialised_wgmma_fails_the_build(
    native: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    note = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    fake_nvcc(tmp_path, f'echo "{note}serialized due to a reason"; {COMPILE}')
    monkeypatch.setenv("DENSENET_EFFICIENT_CUDA", "1")
    with pytest.raises(SystemExit, match="CUDA kernels failed"):
        native.build(project, "1")
    assert not (project / "build/native/cuda/stage.cu.o").exists()


def test_failing_host_compilation_is_an_error(native: ModuleType, project: Path) -> None:
    (project / "csrc/cpu/stage.cpp").write_text("int stage() { return }\n")
    with pytest.raises(SystemExit, match="failed to compile with"):
        native.build(project, "1")


def test_variants_do_not_share_a_folder(
    native: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DENSENET_EFFICIENT_CUDA", "0")
    monkeypatch.setenv("DENSENET_EFFICIENT_DEBUG", "1")
    monkeypatch.setenv("DENSENET_EFFICIENT_SANITIZE", "address,undefined")
    built = native.build(project, "1")
    assert built.library.parent.name == "native-debug-address-undefined"
    text = (built.library.parent / "build.ninja").read_text()
    assert "-fsanitize=address,undefined" in text and "-DNDEBUG -march" not in text
