"""The command line: every command end to end, and what a wrong one says."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from densenet_efficient.cli.main import main
from densenet_efficient.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--model", "densenet_cifar", "--depth", "10", "--growth-rate", "4"]
TRAIN = ["train", *SMALL, "--image-size", "8", "--limit", "64", "--batch", "32", "--device", "cpu"]


def test_train_stop_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main([*TRAIN, *out, "--epochs", "1"]) == 0
    text = capsys.readouterr().out
    assert "epoch   1  loss" in text and "held-out accuracy" in text and "images/s" in text
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"checkpoint.pt", "log.csv", "best.safetensors", "model.safetensors"}
    assert main(["train", *out, "--lr", "0.2", "--resume"]) == 2
    assert "learning_rate: expected 0.2, got 0.1" in capsys.readouterr().err
    assert main(["train", *out, "--resume"]) == 0  # every other option is the checkpoint's
    assert "epoch   " not in capsys.readouterr().out
    assert main(["train", *out, "--epochs", "3", "--resume"]) == 0
    text = capsys.readouterr().out
    assert "epoch   2  loss" in text and "epoch   3  loss" in text and "epoch   1" not in text
    assert main(["train", "--resume", str(tmp_path / "run" / "checkpoint.pt")]) == 0
    assert main(["train", *out, "--epochs", "2", "--resume"]) == 2
    assert "epochs: expected at most the recipe's 2, got 3" in capsys.readouterr().err
    assert main([*TRAIN, *out, "--epochs", "1"]) == 2
    assert "out: expected a folder without a run" in capsys.readouterr().err
    assert main([*TRAIN, *out, "--epochs", "1", "--overwrite", "--reference", "--quiet"]) == 0


def test_train_on_a_folder_of_images(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for index, name in enumerate(("cat", "dog")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(2):
                image = Image.new("RGB", (20, 20), (90 * index, 30 * number, 0))
                image.save(tmp_path / "images" / split / name / f"{number}.png")
    data = ["--data", "imagefolder", str(tmp_path / "images"), "--epochs", "1"]
    assert main([*TRAIN, *data, "--out", str(tmp_path / "run"), "--memory", "store"]) == 0


@pytest.mark.slow
def test_an_interrupt_ends_a_run_cleanly(tmp_path: Path) -> None:
    """A real SIGINT, after the first epoch has been reported. Where the tests run in the background
    it is ignored, which a child inherits."""
    command = [sys.executable, "-m", "densenet_efficient", *TRAIN]
    process = subprocess.Popen(
        [*command, "--epochs", "10000", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    header = [process.stdout.readline() for _ in range(4)]
    assert [line.split()[0] for line in header] == ["model", "data", "recipe", "memory"]
    assert process.stdout.readline().startswith("epoch   1")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    finished = 1 + output.count("epoch ")
    # One more may have been finished than was printed.
    assert any(f"epochs finished: {count};" in errors for count in (finished, finished + 1))
    assert "Traceback" not in errors
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"checkpoint.pt", "log.csv", "best.safetensors"}


def test_an_interrupt_says_nothing_of_what_was_half_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loader that is interrupted while it starts its workers fails once more when it is freed."""

    class HalfBuilt:
        def __init__(self) -> None:
            self.itself = self
            raise KeyboardInterrupt

        def __del__(self) -> None:
            freed.append(self)
            raise AttributeError("no workers yet")

    freed: list[HalfBuilt] = []
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    monkeypatch.setattr(Trainer, "run", lambda trainer: HalfBuilt())
    assert main([*TRAIN, "--epochs", "1", "--out", str(tmp_path / "run")]) == 130
    assert freed and not said
    assert capsys.readouterr().err == "\ninterrupted; epochs finished: 0; none\n"


def test_plan_says_what_a_step_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", *SMALL, "--batch", "2"]
    assert main([*plan, "--budget", "10MB"]) == 0
    text = capsys.readouterr().out
    assert "predicted peak" in text and "denseblock1" in text and "baseline: " in text
    assert "largest batch within 10MB, not counting the baseline of parameters" in text
    alone = int(text.rsplit(" ", 1)[1])
    assert alone > 2
    assert main([*plan, "--budget-gb", "0.01", "--include-baseline"]) == 0
    text = capsys.readouterr().out
    assert "within 0.01GB, including the baseline" in text
    assert 2 < int(text.rsplit(" ", 1)[1]) < alone
    assert main([*plan, "--budget", "1000", "--include-baseline"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(": 0")


def test_plan_groups_its_rows_unless_all_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    grouped = capsys.readouterr().out
    assert main(["plan", "--all"]) == 0
    every = capsys.readouterr().out
    assert len(grouped.splitlines()) < 25 < 30 < len(every.splitlines())
    assert "below 1% of the peak" in grouped and "denseblock4 features" in every
    assert grouped.splitlines()[-3:] == every.splitlines()[-3:]


def test_summary_explain_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", *SMALL]) == 0
    assert "dense block, 1 layers" in capsys.readouterr().out
    assert main(["explain", *SMALL]) == 0
    assert "denseblock1" in capsys.readouterr().out
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "path" in text


@pytest.mark.slow
def test_bench_compares_ours_with_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", *SMALL, "--batch", "2", "--rounds", "2", "--peers", "eager", "recompute"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "time / eager" in text and "memory / eager" in text and "recompute" in text


@pytest.mark.slow
def test_without_the_library_training_says_so_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "densenet_efficient", *TRAIN, "--epochs", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DENSENET_EFFICIENT_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Taking the fallback" in done.stderr and "DENSENET_EFFICIENT_DISABLE" in done.stderr
