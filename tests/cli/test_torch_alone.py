"""The command line where nothing but torch and rich is installed, and its help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from densenet_efficient.cli.main import _parser
from densenet_efficient.cli.parser import budget

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ["numpy", "tqdm", "safetensors", "tensorboard", "sklearn", "matplotlib", "torchvision"]
EXTRAS += ["PIL"]
SMALL = ["--model", "densenet_cifar", "--depth", "10", "--growth-rate", "4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, extra",
    [
        (["plan", *SMALL], None),
        (["summary", *SMALL], None),
        (["explain", *SMALL], None),
        (["info"], None),
        (["bench", *SMALL, "--batch", "2", "--rounds", "1", "--peers", "recompute"], None),
        (["bench", "--rounds", "1"], "pip install torchvision"),
        (["train", "--data", "synthetic"], "pip install 'densenet-efficient[train]'"),
        (["train"], "pip install 'densenet-efficient[train]'"),
        (["demo"], "pip install 'densenet-efficient[train]'"),
    ],
)
def test_every_command_works_or_names_the_extra(
    tmp_path: Path, arguments: list[str], extra: str | None
) -> None:
    code = f"""if True:
        import sys
        sys.modules.update(dict.fromkeys({EXTRAS}))
        sys.path.insert(0, {str(ROOT)!r})
        from densenet_efficient.cli.main import main
        sys.exit(main({arguments}))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    # PyTorch itself warns that NumPy is missing, hence -W.
    if extra is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2 and extra in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_every_option_has_a_line_of_help() -> None:
    (commands,) = (action for action in _parser()._actions if action.dest == "command")
    for name, parser in commands.choices.items():  # type: ignore[union-attr]
        for action in parser._actions:  # type: ignore[union-attr]
            assert action.help, (name, action.dest)
        parser.format_help()  # type: ignore[union-attr]


def test_the_page_of_training_has_every_option() -> None:
    (commands,) = (action for action in _parser()._actions if action.dest == "command")
    page = (ROOT / "docs" / "training.md").read_text()
    for action in commands.choices["train"]._actions:  # type: ignore[union-attr]
        missing = [name for name in action.option_strings if f"`{name}" not in page]
        assert action.dest == "help" or not missing


@pytest.mark.parametrize(
    "text, expected",
    [
        ("12GB", 12e9),
        ("11.5GiB", 11.5 * 2**30),
        ("512 mb", 512e6),
        ("1000", 1000),
        ("2k", 2000),
    ],
)
def test_budgets_as_people_write_them(text: str, expected: float) -> None:
    assert budget(text).amount == expected and not budget(text).is_share
    assert budget("80%").amount == 0.8 and budget("80%").is_share
    assert budget("100%").amount == 1
