"""Loading the compiled operators: once, from any thread, and with a reason wherever it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from densenet_efficient.ops import build_info, cpu_variants, library
from densenet_efficient.ops.info import info
from densenet_efficient.ops.library import MissingLibraryError
from densenet_efficient.version import __version__


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The state of a process that has not loaded the library yet."""
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_failure", None)
    caches = (library.build_info, library._device_reason, library._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


def test_library_loads_and_defines_every_operator() -> None:
    library.load()
    assert library.is_available() and library.unavailable_reason() is None
    assert torch.ops.densenet_efficient.channel_stats.default is not None
    assert library.without_kernels("CPU") is None


def test_threads_load_once(unloaded: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    unloaded.setattr(torch.ops, "load_library", calls.append)
    start = threading.Barrier(8)

    def load() -> None:
        start.wait()
        library.load()

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kernels = cpu_variants.variant_path(library.cpu_variant())
    assert calls == [str(library.LIBRARY), str(kernels)]


def test_missing_library_says_how_to_build(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unloaded.setattr(library, "LIBRARY", tmp_path / "libdensenet_efficient.so")
    with pytest.raises(MissingLibraryError, match=r"does not exist.*run pip install -e \."):
        library.load()
    with pytest.warns(RuntimeWarning, match=r"fallback.*does not exist"):
        assert not library.is_available()
    assert "fallback:" in str(info())


def test_sources_that_are_not_built_name_the_installation_they_hide(
    unloaded: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`pip install .`, then a session in the clone: the unbuilt sources come first on the path."""
    installed = tmp_path / "site" / "densenet_efficient"
    installed.mkdir(parents=True)
    (installed / build_info.LIBRARY.name).touch()
    record = tmp_path / "site" / "densenet_efficient-0.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Name: densenet-efficient\nVersion: 0.1.0\n")
    unloaded.syspath_prepend(str(tmp_path / "site"))
    sources = tmp_path / "clone" / "densenet_efficient" / build_info.LIBRARY.name
    unloaded.setattr(build_info, "LIBRARY", sources)
    unloaded.setattr(library, "LIBRARY", sources)
    with pytest.raises(
        MissingLibraryError, match=f"hide the package that is.*{installed}.*Run from"
    ):
        library.load()
    assert str(installed) in str(info())


def test_missing_module_is_named(unloaded: pytest.MonkeyPatch) -> None:
    # None in sys.modules makes the import fail, as it does under a Python it was not built for.
    unloaded.setitem(sys.modules, "densenet_efficient._module", None)  # type: ignore[arg-type]
    unloaded.delattr("densenet_efficient._module", raising=False)
    with pytest.raises(MissingLibraryError, match=r"_module is not built for Python 3"):
        library.load()
    assert info().build == {} and info().backends == ()


def test_library_of_another_version_is_refused(unloaded: pytest.MonkeyPatch) -> None:
    built = {**library.build_info(), "version": "0.0.1"}
    unloaded.setattr(library, "build_info", lambda: built)
    with pytest.raises(MissingLibraryError, match=rf"are of version 0.0.1.*is {__version__}"):
        library.load()


def test_old_torch_is_refused(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(
        MissingLibraryError,
        match=r"built against torch .*, need torch >= 2\.10, and this is torch 2\.9\.1",
    ):
        library.load()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("lib.so: undefined symbol: aoti_torch_new", r"built against torch .* undefined symbol"),
        ("lib.so: file too short", r"do not load: lib\.so: file too short.*Build them"),
    ],
)
def test_loader_errors_are_explained(
    unloaded: pytest.MonkeyPatch, message: str, expected: str
) -> None:
    def fail(path: str) -> None:
        raise OSError(message)

    unloaded.setattr(torch.ops, "load_library", fail)
    with pytest.raises(MissingLibraryError, match=expected):
        library.load()


@pytest.mark.slow
def test_disabling_is_visible_and_operators_raise() -> None:
    code = """
import warnings, torch
from densenet_efficient.ops import compiled as ops, library
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert not library.is_available() and not library.is_available()
assert len(seen) == 1 and "DENSENET_EFFICIENT_DISABLE=1" in str(seen[0].message)
try:
    ops.channel_stats(torch.ones(4, 2), torch.empty(2, 2))
except library.MissingLibraryError as error:
    print(error)
from densenet_efficient.ops.info import info
print(info())
"""
    done = run_python(code, DENSENET_EFFICIENT_DISABLE="1")
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert "switched off by DENSENET_EFFICIENT_DISABLE=1" in first
    assert any("cpu: fallback:" in line for line in rest)


@pytest.mark.parametrize(
    ("capability", "archs", "ptx", "covered"),
    [
        ((8, 0), ["80"], [], True),
        ((8, 9), ["80"], [], True),  # machine code runs on later minor versions
        ((8, 0), ["86"], [], False),  # but not on earlier ones
        ((9, 0), ["80"], [], False),  # nor on another major version
        ((9, 0), ["90a"], [], True),
        ((10, 3), ["100a"], [], False),  # "a" is for exactly that version
        ((10, 3), ["100f"], [], True),
        ((12, 0), ["90a"], ["80"], True),  # PTX is compiled for anything newer
        ((7, 5), ["80"], ["80"], False),
        ((10, 0), [], ["90a"], False),
    ],
)
def test_covered_architectures(
    capability: tuple[int, int], archs: list[str], ptx: list[str], covered: bool
) -> None:
    assert library.is_covered(capability, archs, ptx) is covered


def test_architecture_names_are_checked() -> None:
    with pytest.raises(ValueError, match="got 'sm_80'"):
        library.is_covered((8, 0), ["sm_80"], [])


def test_cuda_gap_names_the_gpu_and_the_cure(unloaded: pytest.MonkeyPatch) -> None:
    library.load()
    built = {**library.build_info(), "cuda_archs": "90a", "cuda_ptx": ""}
    unloaded.setattr(library, "build_info", lambda: built)
    unloaded.setattr(torch.cuda, "is_available", lambda: True)
    unloaded.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    gap = library.cuda_unavailable_reason(torch.device("cuda", 0))
    assert gap is not None
    assert "compiled for sm_90a, and this GPU is 8.6: rebuild with TORCH_CUDA_ARCH_LIST=8.6" in gap


def test_cuda_gap_names_a_driver_that_is_too_old(unloaded: pytest.MonkeyPatch) -> None:
    """The kernels bring the CUDA runtime of the nvcc that compiled them; torch's may be older."""
    library.load()
    built = {**library.build_info(), "cuda_archs": "90a", "cuda_ptx": "", "nvcc": "13.0"}
    unloaded.setattr(library, "build_info", lambda: built)
    unloaded.setattr(torch.cuda, "is_available", lambda: True)
    unloaded.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    unloaded.setattr(library, "_driver_version", lambda: 12080)
    gap = library.cuda_unavailable_reason(torch.device("cuda", 0))
    assert gap is not None
    assert "compiled with CUDA 13.0, and this GPU's driver supports CUDA 12.8: update" in gap
    library._device_reason.cache_clear()
    unloaded.setattr(library, "_driver_version", lambda: 13020)
    gap = library.cuda_unavailable_reason(torch.device("cuda", 0))
    assert gap is None or "driver" not in gap


def test_the_driver_version_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def cuDriverGetVersion(self, version: object) -> int:
            version._obj.value = 12080  # type: ignore[attr-defined]
            return 0

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(library.ctypes, "CDLL", lambda name: Driver())
    assert library._driver_version() == 12080
    monkeypatch.setattr(library.ctypes, "CDLL", missing)
    assert library._driver_version() is None


def test_cuda_gap_without_cuda_kernels(unloaded: pytest.MonkeyPatch) -> None:
    built = {**library.build_info(), "cuda_archs": "", "cuda": "left out (no nvcc)"}
    unloaded.setattr(library, "build_info", lambda: built)
    assert (
        library.cuda_unavailable_reason(torch.device("cuda"))
        == "CUDA kernels were left out (no nvcc)"
    )


def test_info_prints_versions_backends_and_paths() -> None:
    found = info()
    text = str(found)
    assert found.library == str(library.LIBRARY) and found.problem is None
    assert found.backends[0] == "cpu" and found.build["torch"] in text
    assert found.cpu_variant == library.cpu_variant() and found.cpu_variant in text
    for part in (__version__, torch.__version__, found.build["compiler"], "cpu: compiled kernels"):
        assert part in text
    # Lists are wrapped; a path is never broken.
    assert all(len(line) <= 100 or str(library.LIBRARY) in line for line in text.splitlines())


def test_workspace_sizes_follow_shape_threads_and_dtype() -> None:
    from densenet_efficient._module import workspace_bytes

    one = workspace_bytes("norm_relu_conv1x1_forward", [3136, 256], 128)
    assert 0 < one < 3136 * 256 * 4  # a cache's worth, not a copy of the input
    assert workspace_bytes("norm_relu_conv1x1_forward", [3136, 256], 128, threads=4) > one
    assert workspace_bytes("norm_relu_conv1x1_forward", [3136, 256], 128, element_bytes=8) > one
    image = workspace_bytes("norm_relu_conv3x3_backward", [8, 56, 56, 128], 32)
    assert 0 < image < 8 * 56 * 56 * 128 * 4
    assert workspace_bytes("norm_fold", [3136, 256]) == 0  # it allocates nothing
    assert workspace_bytes("channel_stats", [0, 256]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["channel_stats", [4]]), "got 1 dimensions"),
        ((["channel_stats", [4, 2], 0, 2]), "element_bytes must be 4 or 8, got 2"),
        ((["channel_stats", [4, 2], 0, 4, 0]), "threads must be positive, got 0"),
    ],
)
def test_workspace_arguments_are_checked(arguments: list[object], message: str) -> None:
    from densenet_efficient._module import workspace_bytes

    with pytest.raises(ValueError, match=message):
        workspace_bytes(*arguments)  # type: ignore[arg-type]


def test_cuda_workspace_sizes_follow_the_device() -> None:
    from densenet_efficient._module import cuda_workspace_bytes

    call = ("norm_relu_conv1x1_backward", [401408, 256], 128)
    small, large = (cuda_workspace_bytes(*call, multiprocessors=n) for n in (16, 132))
    assert 0 < small < large < 401408 * 256 * 2 // 4
    for op in ("norm_relu_conv3x3_forward", "transition_backward", "stem_forward"):
        assert 0 < cuda_workspace_bytes(op, [8, 56, 56, 64], 32) < 64 << 20
    with pytest.raises(ValueError, match="multiprocessors must be positive, got 0"):
        cuda_workspace_bytes("channel_stats", [4, 2], multiprocessors=0)
    with pytest.raises(ValueError, match="element_bytes must be 2, 4 or 8, got 1"):
        cuda_workspace_bytes("channel_stats", [4, 2], element_bytes=1)
