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


COMMANDS: list[tuple[list[str], str | None]] = [
    (["plan", *SMALL], None),
    (["summary", *SMALL], None),
    (["explain", *SMALL], None),
    (["info"], None),
    (["bench", *SMALL, "--batch", "2", "--rounds", "1", "--peers", "recompute"], None),
    (["bench", "--rounds", "1"], "pip install torchvision"),
    (["train", "--data", "synthetic"], "pip install 'densenet-efficient[train]'"),
    (["train"], "pip install 'densenet-efficient[train]'"),
    (["demo"], "pip install 'densenet-efficient[train]'"),
]

# PyTorch is imported once, and each command runs in a process forked from there.
ALONE = f"""if True:
    import os, sys
    sys.modules.update(dict.fromkeys({EXTRAS}))
    sys.path.insert(0, {str(ROOT)!r})
    import densenet_efficient
    from densenet_efficient.cli.main import main
    for index, command in enumerate({[command for command, _ in COMMANDS]}):
        if os.fork() == 0:
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{{index}}.{{name}}", os.O_CREAT | os.O_WRONLY), stream)
            sys.exit(main(command))
        status = os.waitstatus_to_exitcode(os.wait()[1])
        open(f"{{index}}.status", "w").write(str(status))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every command's exit status and what it wrote to standard error, by its
    index."""
    folder = tmp_path_factory.mktemp("alone")
    # PyTorch itself warns that NumPy is missing, hence -W.
    command = [sys.executable, "-W", "ignore", "-c", ALONE]
    subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=lambda i: " ".join(COMMANDS[i][0]))
def test_every_command_works_or_names_the_extra(answers: Path, index: int) -> None:
    extra = COMMANDS[index][1]
    status = int((answers / f"{index}.status").read_text())
    errors = (answers / f"{index}.err").read_text()
    if extra is None:
        assert status == 0, errors
    else:
        assert status == 2 and extra in errors
        assert len(errors.splitlines()) == 1


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
