"""convert-weights: weights made elsewhere into a file with torchvision's keys."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically
from ..models.catalogue import CATALOGUE, build
from ..models.pretrained import fetch_weights, load_weights, published_classes
from ..train.checkpoint import export_safetensors
from .parser import add_command, count

__all__ = ["register"]


CLASSIFIERS = [name for name, entry in CATALOGUE.items() if not entry.network.dense]


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "convert-weights", "write weights of another library with torchvision's keys"
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "source", metavar="SOURCE",
        help="a file (torch.save's, safetensors, Keras' h5), a URL, hf-hub:OWNER/NAME, or the name "
        "of a torchvision entry such as IMAGENET1K_V1",
    )  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="FILE.safetensors or FILE.pth")
    parser.add_argument(
        "--model", choices=CLASSIFIERS, default="densenet121", metavar="NAME",
        help="which network they are of, one of those that `list` shows",
    )  # fmt: skip
    parser.add_argument("--in-channels", type=count, default=3, metavar="N", help="of the images")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")


def _run(options: argparse.Namespace, words: list[str]) -> int:
    out: Path = options.out
    if out.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"out: expected FILE.safetensors or FILE.pth, got {out}")
    if out.exists() and not options.overwrite:
        raise ValueError(f"out: expected a new file, or --overwrite, got {out}")
    state = fetch_weights(options.source, options.model)
    classes = published_classes(state)
    model = build(options.model, num_classes=classes, in_channels=options.in_channels)
    load_weights(model, state, source=f"weights {options.source}")
    found = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if out.suffix == ".pth":
        write_atomically(out, lambda temporary: torch.save(found, temporary))
    else:
        export_safetensors(model, out, {"format": "pt"})
    keras = Path(options.source).suffix in (".h5", ".hdf5")
    advice = "; build the network with eps=1.001e-5, as Keras' norms have it" if keras else ""
    print(f"{options.model}, {classes} classes: {len(found)} tensors in {out}{advice}")
    return 0
