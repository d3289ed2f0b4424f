"""The scripts that make runs: what a machine lacks, ptxas's report, the runner of gpu-check."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelILi3EEvPf' for 'sm_80'
ptxas info    : Function properties for _Z6kernelILi3EEvPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size, 5120 bytes smem
ptxas info    : Compiling entry function '_Z5cleanPf' for 'sm_90a'
ptxas info    : Function properties for _Z5cleanPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


@pytest.fixture(scope="module", autouse=True)
def tools() -> Iterator[None]:
    """Makes the scripts importable."""
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.fixture
def report() -> ModuleType:
    return importlib.import_module("ptxas_report")


@pytest.fixture
def gpu_check() -> ModuleType:
    return importlib.import_module("gpu_check")


def test_spills_are_found_in_the_report(
    report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stage.cu.o.ptxas").write_text(REPORT)
    spilling, clean = report.read_reports(tmp_path)
    assert (spilling.file, spilling.arch, spilling.registers) == ("stage", "sm_80", 168)
    assert (spilling.shared, spilling.stack) == (5120, 16)
    assert (spilling.spill_stores, spilling.spill_loads) == (8, 4)
    assert (clean.arch, clean.registers, clean.shared, clean.spill_stores) == ("sm_90a", 12, 0, 0)
    assert report.check([spilling, clean]) == 1 and report.check([clean]) == 0
    assert "spills 8 bytes of stores" in capsys.readouterr().err


def test_a_folder_without_reports_is_an_error(report: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="build the CUDA kernels first"):
        report.read_reports(tmp_path)


def test_the_machine_is_checked_before_anything_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_machine = importlib.import_module("check_machine")
    assert check_machine.main() is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "No C++ compiler was found (looked for no-such-compiler)" in check_machine.main()
    monkeypatch.setitem(sys.modules, "ensurepip", None)  # type: ignore[arg-type]
    assert "apt install python3-venv" in check_machine.main()
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert "needs Python 3.10 or newer" in check_machine.main()


def test_steps_share_the_time(gpu_check: ModuleType, tmp_path: Path) -> None:
    runner = gpu_check.Runner(1, tmp_path / "log")
    python = [sys.executable, "-c"]
    assert runner.run("passes", [*python, "print('fine')"], 30)
    assert not runner.run("fails", [*python, "raise SystemExit('broken')"], 30)
    assert not runner.run("hangs", [*python, "import time; time.sleep(60)"], 1)
    runner.end = 0.0
    assert not runner.run("late", [*python, "pass"], 30)
    runner.skip("absent", "there is none")
    status = {outcome.step: (outcome.status, outcome.detail) for outcome in runner.outcomes}
    assert status["passes"] == ("passed", "fine")
    assert status["fails"] == ("failed", "broken")
    assert status["hangs"] == ("failed", "stopped after 1 s")
    assert status["late"] == ("not run", "the time was used up")
    assert status["absent"] == ("skipped", "there is none")
    assert "broken" in (tmp_path / "log").read_text()


def test_gpu_check_says_what_it_needs() -> None:
    code = "import sys; sys.modules['pytest'] = None; sys.argv = ['gpu_check']; import gpu_check; "
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(gpu_check.main())"],
        cwd=TOOLS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "needs torch and pytest" in done.stderr


def test_gpu_check_runs_every_step_and_fails_with_any(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    failing: set[str] = set()
    environments: dict[str, dict[str, str]] = {}

    def run(self: object, step: str, command: list[str], limit: float, **env: str) -> bool:
        environments[step] = env
        status = "failed" if step in failing else "passed"
        self.record(gpu_check.Outcome(step, status, 1.0, " ".join(command), "a line"))  # type: ignore[attr-defined]
        return step not in failing

    monkeypatch.setattr(gpu_check.Runner, "run", run)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "library_gap", lambda: "there is none")
    monkeypatch.setattr(gpu_check, "find_tool", lambda name, *folders: f"/opt/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 0
    steps = list(environments)
    assert steps[:3] == ["build for 9.0", "info", "tests"]
    assert steps[3:6] == ["memcheck", "racecheck", "initcheck"]
    assert steps[6:] == ["error", "operators", "prediction", "training", "memory"]
    assert environments["operators"]["DENSENET_EFFICIENT_OCCUPANCY"].startswith(str(tmp_path))
    assert environments["build for 9.0"]["TORCH_CUDA_ARCH_LIST"] == "9.0"
    text = (tmp_path / "gpu-check.md").read_text()
    assert "NVIDIA H200" in text and "| racecheck" in text
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA T4")
    environments.clear()
    assert gpu_check.main() == 0 and "prediction" not in environments
    assert "| prediction" in (tmp_path / "gpu-check.md").read_text()
    failing.add("racecheck")
    assert gpu_check.main() == 1
    failing.add("build for 9.0")
    environments.clear()
    assert gpu_check.main() == 1 and list(environments) == ["build for 9.0"]
