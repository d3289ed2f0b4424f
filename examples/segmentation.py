"""Segmentation with an FC-DenseNet: shapes on a noisy ground, a class for every pixel.

    python examples/segmentation.py                          FC-DenseNet103, 32 px, on the CPU
    python examples/segmentation.py --model fc_densenet56 --steps 200
    python examples/segmentation.py --size 128 --batch 16 --device cuda

Circles, squares and triangles of any colour, size and angle, later ones over earlier ones, under
uneven light and noise: what tells the classes apart is the outline, and where two shapes overlap
the network must continue it. Images are drawn as they are needed, from a seed, so nothing is
downloaded. Writes segmentation.png (images, truth, prediction) and segmentation.json into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import densenet_efficient

MODELS = ("fc_densenet56", "fc_densenet67", "fc_densenet103")
CLASSES = ("ground", "circle", "square", "triangle")
COLOURS = ("#303030", "#e69f00", "#56b4e9", "#009e73")  # told apart by colour-blind readers, too
SIDES = {2: 4, 3: 3}
NOISE = 0.08


def draw_shapes(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [count, 3, size, size] of about -1 to 1 and the classes [count, size, size] of their
    pixels, from a generator on the CPU."""
    images = torch.empty(count, 3, size, size)
    labels = torch.empty(count, size, size, dtype=torch.long)
    for image, label in zip(images, labels, strict=True):
        _draw(image, label, generator)
    return images, labels


def _draw(image: Tensor, label: Tensor, generator: torch.Generator) -> None:
    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    size = image.shape[-1]
    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    image.copy_(uniform(3, 1, 1, high=0.45).expand(3, size, size))
    label.zero_()
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        kind = int(torch.randint(1, len(CLASSES), (), generator=generator))
        centre_y, centre_x = uniform(2, low=0.1, high=0.9).tolist()
        radius = uniform(1, low=0.18, high=0.34).item()
        angle = uniform(1, high=2 * math.pi).item()
        inside = _inside(kind, y - centre_y, x - centre_x, radius, angle)
        image[:, inside] = uniform(3, 1, low=0.55)
        label[inside] = kind
    direction, strength = uniform(1, high=2 * math.pi).item(), uniform(1, high=0.5).item()
    image *= 1 + strength * ((x - 0.5) * math.cos(direction) + (y - 0.5) * math.sin(direction))
    image += NOISE * torch.randn(image.shape, generator=generator)
    image.mul_(2).sub_(1)


def _inside(kind: int, y: Tensor, x: Tensor, radius: float, angle: float) -> Tensor:
    """Of a circle, or of a regular polygon with corners at the radius: within all its edges."""
    if kind not in SIDES:
        return y.square() + x.square() < radius**2
    sides = SIDES[kind]
    inner = radius * math.cos(math.pi / sides)
    normals = [angle + 2 * math.pi * i / sides for i in range(sides)]
    distances = [x * math.cos(normal) + y * math.sin(normal) for normal in normals]
    return torch.stack(distances).amax(0) < inner


def train(model: nn.Module, options: argparse.Namespace) -> list[float]:
    """AdamW with a rising and falling learning rate; the loss of every step."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.lr, total_steps=max(options.steps, 2), pct_start=0.15
    )
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    for step in range(1, options.steps + 1):
        images, labels = draw_shapes(options.batch, options.size, generator)
        logits = model(images.to(options.device))
        loss = F.cross_entropy(logits, labels.to(options.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == options.steps:
            mean = sum(losses[-20:]) / len(losses[-20:])
            seconds = time.perf_counter() - start
            print(f"step {step:4}  loss {mean:.3f}  {seconds:6.1f} s", flush=True)
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> dict[str, Any]:
    """Pixel accuracy, that of the shapes' pixels alone, and the intersection over union of every
    class; "predicted" [N, H, W]."""
    model.eval()
    device = next(model.parameters()).device
    parts = [model(part.to(device)).argmax(1).cpu() for part in images.split(batch)]
    predicted = torch.cat(parts)
    right, shapes = predicted == labels, labels > 0
    overlaps = {
        name: ((predicted == kind) & (labels == kind)).sum().item()
        / max(((predicted == kind) | (labels == kind)).sum().item(), 1)
        for kind, name in enumerate(CLASSES)
    }
    return {
        "accuracy": right.float().mean().item(),
        "accuracy_of_shapes": right[shapes].float().mean().item(),
        "overlap": overlaps,
        "predicted": predicted,
    }


def picture(path: Path, images: Tensor, labels: Tensor, predicted: Tensor, title: str) -> None:
    """Image, truth, prediction and the wrong pixels side by side, a row for every image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, patches, pyplot

    palette = colors.ListedColormap(COLOURS)
    limits = {"cmap": palette, "vmin": -0.5, "vmax": len(CLASSES) - 0.5, "interpolation": "nearest"}
    columns = ("image", "truth", "prediction", "wrong pixels")
    figure, axes = pyplot.subplots(
        len(images), len(columns), figsize=(2.1 * len(columns), 2.1 * len(images) + 0.9),
        squeeze=False,
    )  # fmt: skip
    for row, image, label, guess in zip(axes, images, labels, predicted, strict=True):
        row[0].imshow((image.movedim(0, -1) / 2 + 0.5).clamp(0, 1).numpy())
        row[1].imshow(label.numpy(), **limits)
        row[2].imshow(guess.numpy(), **limits)
        row[3].imshow(
            (guess != label).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest"
        )
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    handles = [
        patches.Patch(color=colour, label=name)
        for colour, name in zip(COLOURS, CLASSES, strict=True)
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(CLASSES), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default=MODELS[-1])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=32, help="pixels a side, at least 32")
    parser.add_argument("--lr", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument(
        "--drop-rate", type=float, default=0.0,
        help="of the dropout; no image is seen twice here, so that there is nothing to overfit",
    )  # fmt: skip
    parser.add_argument("--held-out", type=int, default=64, help="images to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("."), help="a folder")
    options = parser.parse_args(words)
    torch.manual_seed(options.seed)
    build = getattr(densenet_efficient, options.model)
    model = build(num_classes=len(CLASSES), drop_rate=options.drop_rate).to(options.device)
    planned = densenet_efficient.plan(model, (options.batch, 3, options.size, options.size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{options.model}: {parameters:,} parameters; a step of {options.batch} images of "
        f"{options.size} px needs {planned.peak_bytes / 1e6:.0f} MB"
    )
    start = time.perf_counter()
    losses = train(model, options)
    seconds = time.perf_counter() - start
    unseen = torch.Generator().manual_seed(options.seed + 1)
    images, labels = draw_shapes(options.held_out, options.size, unseen)
    found = evaluate(model, images, labels, options.batch)
    predicted = found.pop("predicted")
    title = f"{options.model} after {options.steps} steps: {found['accuracy']:.1%} of the pixels"
    print(f"{title} of {len(images)} new images right, in {seconds:.0f} s of training")
    overlaps = ", ".join(f"{name} {value:.3f}" for name, value in found["overlap"].items())
    print(f"of the shapes' pixels {found['accuracy_of_shapes']:.1%}")
    print(f"intersection over union: {overlaps}")
    options.out.mkdir(parents=True, exist_ok=True)
    shown = min(4, len(images))
    picture(options.out / "segmentation.png", images[:shown], labels[:shown], predicted[:shown],
            title)  # fmt: skip
    described = {**vars(options), "out": str(options.out), "seconds": seconds}
    described |= {"planned_peak_bytes": planned.peak_bytes, "losses": losses, **found}
    (options.out / "segmentation.json").write_text(json.dumps(described, indent=2) + "\n")
    print(f"written: {options.out / 'segmentation.png'}, {options.out / 'segmentation.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
