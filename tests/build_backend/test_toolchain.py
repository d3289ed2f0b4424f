"""What the build finds, what it builds for, and what it says where something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.programs import executable

ROOT = Path(__file__).parents[2]


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
        "found = toolchain.find_torch(); print(found.version, found.cuda or None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    import torch

    assert done.stdout.split() == [torch.__version__, str(torch.version.cuda)], done.stderr


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
    toolchain: ModuleType, targets: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = executable(tmp_path / "old-g++", 'echo "unrecognized option" >&2; exit 1')
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(toolchain.BuildError, match=r"refuses -std=c\+\+20.*unrecognized option"):
        targets.variants(toolchain.find_compiler())


def test_missing_ninja_says_what_to_install(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)  # type: ignore[arg-type]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(toolchain.BuildError, match="pip install ninja"):
        toolchain.find_ninja()


@pytest.fixture
def x86() -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the levels are those of x86-64")


def test_march_decides_the_variants_and_their_features(
    targets: ModuleType, toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, x86: None
) -> None:
    compiler = toolchain.find_compiler()
    monkeypatch.setenv("DENSENET_EFFICIENT_MARCH", "x86-64-v3, none")
    third, plain = targets.variants(compiler)
    assert (third.name, third.flags) == ("x86-64-v3", ("-march=x86-64-v3",))
    assert {"avx2", "fma"} <= set(third.features) and "avx512f" not in third.features
    assert (plain.name, plain.flags) == ("none", ()) and "avx2" not in plain.features
    monkeypatch.delenv("DENSENET_EFFICIENT_MARCH")
    (native,) = targets.variants(compiler)
    assert (native.name, native.flags) == ("native", ("-march=native",))


def test_portable_kernels_need_no_more_than_their_level(
    targets: ModuleType, toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, x86: None
) -> None:
    monkeypatch.setenv("DENSENET_EFFICIENT_MARCH", "portable")
    found = targets.variants(toolchain.find_compiler())
    assert [variant.name for variant in found] == list(targets.PORTABLE["x86_64"])
    first, second, third, fourth = (set(variant.features) for variant in found)
    assert first == {"sse4_2", "popcnt"}
    assert second - first == {"movbe", "avx", "f16c", "fma", "bmi1", "bmi2", "abm", "avx2"}
    assert third - second == {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
    assert fourth - third == {"avx512_bf16"}


def test_arm_has_one_portable_variant_and_may_know_no_native(
    targets: ModuleType, toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Told to a compiler that answers as one for Arm would."""
    compiler = executable(
        tmp_path / "arm-g++",
        """
case "$*" in
  *-march=native*) echo "unknown value native" >&2; exit 1;;
  *-march=armv8-a+dotprod*) echo "#define __ARM_FEATURE_DOTPROD 1";;
  *) echo "#define __aarch64__ 1";;
esac""",
    )
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(targets.platform, "machine", lambda: "aarch64")
    found = {}
    for asked in ("portable", "native", "armv8-a+dotprod"):
        monkeypatch.setenv("DENSENET_EFFICIENT_MARCH", asked)
        (variant,) = targets.variants(toolchain.find_compiler())
        found[asked] = (variant.name, variant.flags, variant.features)
    assert found == {
        "portable": ("armv8-a", ("-march=armv8-a",), ()),
        "native": ("none", (), ()),
        "armv8-a+dotprod": ("armv8-a+dotprod", ("-march=armv8-a+dotprod",), ("asimddp",)),
    }


def test_the_module_is_for_the_pythons_that_are_named(
    targets: ModuleType, toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (own,) = targets.interpreters()
    assert own.tag == f"cp3{sys.version_info.minor}" and Path(own.include, "Python.h").is_file()
    assert targets.wheel_tag(own.tag, own.tag) == (own.tag, own.tag)
    other = executable(
        tmp_path / "python3.99", """echo '["cp399", "/include", ".cpython-399.so"]'"""
    )
    named = os.pathsep.join([sys.executable, str(other), sys.executable])
    monkeypatch.setenv("DENSENET_EFFICIENT_PYTHONS", named)
    assert [interpreter.tag for interpreter in targets.interpreters()] == [own.tag, "cp399"]
    assert targets.wheel_tag(own.tag, own.tag) == (f"{own.tag}.cp399", "none")
    monkeypatch.setenv("DENSENET_EFFICIENT_PYTHONS", "python-of-nowhere")
    with pytest.raises(
        toolchain.BuildError, match=r"names python-of-nowhere, which cannot be found"
    ):
        targets.interpreters()
