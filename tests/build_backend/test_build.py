"""ninja: what it builds, does again and records, on a project of three small files."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.programs import executable

ROOT = Path(__file__).parents[2]


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
    with_cuda = dataclasses.replace(native.toolchain.find_torch(), cuda="13.0")
    monkeypatch.setattr(native.toolchain, "find_torch", lambda: with_cuda)
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
    (kernels,) = built.kernels
    assert kernels.name == "libdensenet_efficient_native.so" and len(built.modules) == 1
    assert "stage" in subprocess.run(["nm", kernels], capture_output=True, text=True).stdout
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


def test_no_cuda_kernels_are_compiled_for_a_torch_without_cuda(
    native: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing could run them, and they take minutes."""
    fake_nvcc(tmp_path, COMPILE)
    without = dataclasses.replace(native.toolchain.find_torch(), version="2.13.0+cpu", cuda="")
    monkeypatch.setattr(native.toolchain, "find_torch", lambda: without)
    native.build(project, "1")
    assert "left out (torch 2.13.0+cpu has no CUDA; DENSENET_EFFICIENT_CUDA=1" in recorded(project)
    monkeypatch.setenv("DENSENET_EFFICIENT_CUDA", "1")
    native.build(project, "1")
    assert '{"cuda", "compiled"}' in recorded(project)


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


def test_every_variant_and_every_python_gets_a_file(
    native: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a wheel for several machines and Pythons holds; the rest of it is built once."""
    include = sysconfig.get_path("include")
    answer = json.dumps(["cp399", include, ".cpython-399.so"])
    other = executable(tmp_path / "python3.99", f"echo '{answer}'")
    monkeypatch.setenv("DENSENET_EFFICIENT_CUDA", "0")
    monkeypatch.setenv("DENSENET_EFFICIENT_MARCH", "native none")
    monkeypatch.setenv("DENSENET_EFFICIENT_PYTHONS", f"{sys.executable}{os.pathsep}{other}")
    built = native.build(project, "1")
    assert [path.name for path in built.files] == [
        "libdensenet_efficient.so",
        "libdensenet_efficient_native.so",
        "libdensenet_efficient_none.so",
        "_module" + sysconfig.get_config_var("EXT_SUFFIX"),
        "_module.cpython-399.so",
    ]
    assert all(path.is_file() for path in built.files)
    assert '{"march", "native none"}' in recorded(project)


def test_builds_of_different_options_do_not_share_a_folder(
    native: ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DENSENET_EFFICIENT_CUDA", "0")
    monkeypatch.setenv("DENSENET_EFFICIENT_DEBUG", "1")
    monkeypatch.setenv("DENSENET_EFFICIENT_SANITIZE", "address,undefined")
    built = native.build(project, "1")
    assert built.library.parent.name == "native-debug-address-undefined"
    text = (built.library.parent / "build.ninja").read_text()
    assert "-fsanitize=address,undefined" in text and "-DNDEBUG -D" not in text
