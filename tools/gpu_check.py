"""Everything that needs a GPU, in one command that installs nothing and needs no network.

    make gpu-check                    (python3, or PYTHON=...; about 8 minutes)
    python tools/gpu_check.py --minutes 8 [--rebuild] [--no-benchmarks]

Builds the kernels for the GPU at hand, or takes the library that is there when it covers this GPU;
runs the tests of tests/gpu, in parallel where pytest-xdist is there; runs those marked `sanitize`
under compute-sanitizer's memcheck, racecheck and initcheck; runs the benchmarks, which write their
own tables, and sets the operators next to their prediction (tools/predict) and their occupancy next
to what the tilings assume. Steps have shares of the time; what no longer fits is reported as not
run, and the exit status is 1 unless all steps passed (a missing compute-sanitizer and a GPU without
a prediction are reported and do not fail the check). Writes gpu-check.md, .json and .log to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"

# The other folders' tests import packages that a machine with a GPU may not have.
TESTS = "tests/gpu"
PROCESSES = 8  # each with a CUDA context of its own
PASSED, FAILED, NOT_RUN, SKIPPED = "passed", "failed", "not run", "skipped"


@dataclass(frozen=True)
class Outcome:
    """What became of one step."""

    step: str
    status: str
    seconds: float
    command: str
    detail: str  # the last line of the output, or why the step did not run


class Runner:
    """Runs steps within a common time limit and keeps their output in one log."""

    def __init__(self, minutes: float, log: Path) -> None:
        self.end = time.monotonic() + 60 * minutes
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.open("w")
        self.outcomes: list[Outcome] = []
        self.output = ""  # of the last command

    def run(self, step: str, command: list[str], limit: float, **environment: str) -> bool:
        """Runs a command for at most `limit` seconds; whether it passed."""
        text = " ".join([*(f"{k}={v}" for k, v in environment.items()), *map(short, command)])
        left = self.end - time.monotonic()
        if left < min(20.0, limit):
            self.record(Outcome(step, NOT_RUN, 0, text, "the time was used up"))
            return False
        start = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=min(limit, left),
            )
            output, status = done.stdout, PASSED if done.returncode == 0 else FAILED
        except subprocess.TimeoutExpired as expired:
            output = (expired.stdout or b"").decode(errors="replace")
            output += f"\nstopped after {min(limit, left):.0f} s"
            status = FAILED
        self.output = output
        lines = output.strip().splitlines()
        self.log.write(f"\n== {step}: {text}\n{output}\n")
        self.record(
            Outcome(step, status, time.monotonic() - start, text, lines[-1] if lines else ""), lines
        )
        return status == PASSED

    def skip(self, step: str, reason: str) -> None:
        self.record(Outcome(step, SKIPPED, 0, "", reason))

    def record(self, outcome: Outcome, lines: list[str] | None = None) -> None:
        self.outcomes.append(outcome)
        print(f"{outcome.status:<8} {outcome.seconds:6.1f} s  {outcome.step}: {outcome.detail}")
        if outcome.status == FAILED and lines:
            print("\n".join(f"    {line}" for line in lines[-40:]))
        sys.stdout.flush()
        self.log.flush()


def short(word: str) -> str:
    """A word of a command as a person would type it in the repository."""
    return "python" if word == sys.executable else word.replace(str(ROOT) + "/", "")


def library_gap() -> str | None:
    """Why the library that is there cannot serve this GPU; None where it can. Asked in a process of
    its own, since this one loads the library only after the build."""
    code = (
        "import torch\nfrom densenet_efficient.ops import library\n"
        "reason = library.unavailable_reason()\n"
        "reason = reason or library.cuda_unavailable_reason(torch.device('cuda'))\n"
        "print(reason or '')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or (done.stderr.strip() if done.returncode else None)


def sources_are_newer() -> bool:
    """Whether a source of the kernels is younger than the library."""
    library = ROOT / "densenet_efficient" / "libdensenet_efficient.so"
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    return (
        not library.is_file() or max(p.stat().st_mtime for p in sources) > library.stat().st_mtime
    )


def build(runner: Runner, capability: str, rebuild: bool) -> bool:
    gap = library_gap()
    if gap is None and not rebuild:
        if not sources_are_newer():
            runner.skip("build", "the library that is there covers this GPU")
            return True
        if find_tool("nvcc", "bin") is None:
            runner.skip("build", "the library that is there covers this GPU, and nvcc is missing")
            return True
    return runner.run(
        f"build for {capability}",
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        240,
        TORCH_CUDA_ARCH_LIST=capability,
        DENSENET_EFFICIENT_CUDA="1",
    )


def find_tool(name: str, *folders: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or in these folders of CUDA_HOME."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = os.pathsep.join(f"{home}/{folder}" for folder in folders)
    return shutil.which(name) or shutil.which(name, path=places)


def in_parallel() -> list[str]:
    """pytest's options for several processes, where pytest-xdist is installed."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(PROCESSES, os.cpu_count() or 1))]


def sanitize(runner: Runner) -> None:
    sanitizer = find_tool("compute-sanitizer", "bin", "compute-sanitizer")
    for tool in ("memcheck", "racecheck", "initcheck"):
        if sanitizer is None:
            runner.skip(tool, "compute-sanitizer was not found on PATH or in CUDA_HOME")
            continue
        pytest = [sys.executable, "-m", "pytest", "-q", TESTS, "-m", "gpu and sanitize"]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest]
        # The caching allocator would hide reads past the end of a tensor.
        runner.run(tool, command, 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def benchmarks(runner: Runner, device: str) -> None:
    """device: the GPU's name."""
    from tools.predict.devices import gpu_named

    python = [sys.executable]
    error = ["benchmarks/bench_error.py", "--device", "cuda", "--draws", "4"]
    runner.run("error", [*python, *error], 60)
    occupancy = RESULTS / "occupancy-cuda.txt"
    occupancy.unlink(missing_ok=True)
    operators = [*python, "benchmarks/bench_operators.py"]
    if runner.run("operators", operators, 90, DENSENET_EFFICIENT_OCCUPANCY=str(occupancy)):
        predict = ["-m", "tools.predict", "--operators", str(RESULTS / "operators-cuda.json")]
        try:
            gpu_named(device)
        except ValueError as unlisted:
            runner.skip("prediction", str(unlisted))
        else:
            runner.run("prediction", [*python, *predict, "--occupancy", str(occupancy)], 120)
            print(runner.output)
    options = ["--device", "cuda", "--quick"]
    runner.run("training", [*python, "benchmarks/bench_training.py", *options], 260)
    runner.run("memory", [*python, "benchmarks/bench_memory.py", *options], 60)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8, help="time for everything together")
    parser.add_argument("--rebuild", action="store_true", help="even where a library is there")
    parser.add_argument("--no-benchmarks", action="store_true")
    options = parser.parse_args()

    try:
        import pytest  # noqa: F401
        import torch
    except ImportError as error:
        return fail(f"{error}: make gpu-check needs torch and pytest; PYTHON=... names another one")
    if not torch.cuda.is_available():
        return fail(f"torch {torch.__version__} sees no CUDA device")
    from densenet_efficient.bench.tables import markdown_table, write_results

    major, minor = torch.cuda.get_device_capability()
    runner = Runner(options.minutes, RESULTS / "gpu-check.log")
    if build(runner, f"{major}.{minor}", options.rebuild):
        runner.run("info", [sys.executable, "-m", "densenet_efficient", "info"], 60)
        tests = [sys.executable, "-m", "pytest", "-q", TESTS, "-m", "gpu", *in_parallel()]
        runner.run("tests", tests, 180)
        sanitize(runner)
        if not options.no_benchmarks:
            benchmarks(runner, torch.cuda.get_device_name(0))

    rows = [[o.step, o.status, f"{o.seconds:.1f}", o.detail] for o in runner.outcomes]
    path = write_results(
        RESULTS,
        "gpu-check",
        "Checks on a GPU",
        {"steps": [asdict(outcome) for outcome in runner.outcomes]},
        markdown_table(("step", "status", "seconds", "last line"), rows),
        "cuda",
    )
    print(f"written: {path}, .json and .log")
    return int(any(o.status in (FAILED, NOT_RUN) for o in runner.outcomes))


def fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
