"""The commands of a page: what of them runs within a second is executed, the rest is checked.

Our own commands must parse. Those that only look (`LOOK`) are run as they stand, a training run is
cut to five steps on generated images; measurements, what reads a file that the reader has, and what
torchrun starts are parsed only. Of other programs' commands the parts that are ours must exist:
scripts and their options, modules, tests, targets of the Makefile, extras.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

from densenet_efficient.cli.main import _parser, main

ROOT = Path(__file__).resolve().parents[2]
LOOK = ("explain", "info", "list", "plan", "summary")
SHORT = (
    "--data synthetic --limit 20 --batch 4 --epochs 1 --image-size 32 --device cpu --workers 0 "
    "--randaugment 0 --out run --overwrite"
)
OTHERS = {
    "apt-get", "cd", "cibuildwheel", "conda", "cp", "curl", "docker", "export", "git", "ls",
    "mkdir", "nvidia-smi", "source", "tensorboard", "uv",
}  # fmt: skip


def of_script(script: str) -> list[list[str]]:
    """The commands of a script as words, without comments and variables in front of them."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\([^)]*\)", "OUTPUT", line)
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            del words[0]
        if words:
            found.append(words)
    return found


def run(words: list[str], where: str) -> None:
    """Runs or checks a command. AssertionError, naming the place, where a reader could not."""
    program, *arguments = words
    program = Path(program).name
    if program == "densenet-efficient" or _module(words) == "densenet_efficient":
        ours = words[words.index("densenet_efficient") + 1 :] if "-m" in words else arguments
        if program == "torchrun":
            parse(ours, where)
        else:
            _run_ours(ours, where)
    elif _module(words):
        name = _module(words)
        assert importlib.util.find_spec(name) or not name.startswith(("tools", "tests")), where
        if name == "pytest":
            paths = [word for word in arguments if "/" in word]
            assert all((ROOT / path).exists() for path in paths), f"{where}: no such test: {paths}"
    elif program.startswith("python"):
        _check_script(arguments, where)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = {word for word in arguments if "=" not in word} - set(targets)
        assert not unknown, f"{where}: the Makefile has no {unknown}"
    elif program == "pip":
        _check_extras(arguments, where)
    else:
        assert program in OTHERS, f"{where}: what is {program}?"


def parse(words: list[str], where: str) -> str:
    """The name of a command of ours, whose options were accepted; the name alone is enough."""
    try:
        return str(_parser().parse_args(words if words[1:] else [*words, "--help"]).command)
    except ValueError as error:
        raise AssertionError(f"{where}: {error}") from error
    except SystemExit:  # from --help
        return words[0]


def _run_ours(words: list[str], where: str) -> None:
    name = parse(words, where)
    if name == "train" and not {"--resume", "--weights"} & set(words):
        cut = [*words, *SHORT.split()]
        if "--depth" in words or "--model" not in words:  # the default has 100 layers
            cut += ["--depth", "10", "--growth-rate", "4"]
        assert main(cut) == 0, where
    elif name in LOOK:
        assert main(words) == 0, where


def _module(words: list[str]) -> str:
    """The module that `python -m` or `torchrun -m` runs, or nothing."""
    program = Path(words[0]).name
    runs = program.startswith("python") or program == "torchrun"
    return words[words.index("-m") + 1] if runs and "-m" in words else ""


def _check_script(arguments: list[str], where: str) -> None:
    path = ROOT / arguments[0]
    assert path.exists(), f"{where}: no such script: {arguments[0]}"
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    missing = [option for option in options if f'"{option}"' not in path.read_text()]
    assert not missing, f"{where}: {arguments[0]} has no {missing}"


def _check_extras(arguments: list[str], where: str) -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for word in arguments:
        match = re.fullmatch(r"(?:\.|densenet-efficient.*)\[(.*)\]", word)
        unknown = set(match[1].split(",")) - set(extras) if match else set()
        assert not unknown, f"{where}: there are no extras {unknown}"
