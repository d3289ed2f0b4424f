"""Your own training loop: torchvision's DenseNet-121, converted by one line.

python examples/plain_loop.py FOLDER    images in FOLDER/train/CLASS/* and FOLDER/val/CLASS/*
python examples/plain_loop.py           generated noise, to see it run
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

import densenet_efficient


def images_of(options: argparse.Namespace) -> tuple[datasets.VisionDataset, ...]:
    """Training and held-out images."""
    size = options.image_size
    pixels = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    pixels.append(v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    if options.folder is None:
        shape = (3, size, size)
        generated = datasets.FakeData(options.images, shape, 10, v2.Compose(pixels))
        return generated, generated
    augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *pixels])
    plain = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), *pixels])
    return (
        datasets.ImageFolder(f"{options.folder}/train", augmented),
        datasets.ImageFolder(f"{options.folder}/val", plain),
    )


def main(arguments: Sequence[str] | None = None) -> float:
    """Train; returns the accuracy on the held-out images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="of images; none: they are generated")
    parser.add_argument("--images", type=int, default=64, help="how many are generated")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--weights", help="such as IMAGENET1K_V1, which is downloaded")
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, held_out = images_of(options)
    model = models.densenet121(weights=options.weights)
    classes = 10 if options.folder is None else len(train.classes)
    model.classifier = nn.Linear(model.classifier.in_features, classes)

    densenet_efficient.convert(model)  # the one line; whatever follows is any training loop
    model.to(device, memory_format=torch.channels_last)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    print(
        f"planned peak of a step: {densenet_efficient.plan(model, shape).peak_bytes / 1e6:.0f} MB"
    )

    optimizer = torch.optim.SGD(
        model.parameters(), options.learning_rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    batches = DataLoader(train, options.batch_size, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.epochs * len(batches)
    )
    accuracy = 0.0
    for epoch in range(options.epochs):
        model.train()
        for images, labels in batches:
            images = images.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = nn.functional.cross_entropy(model(images), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in DataLoader(held_out, options.batch_size):
                correct += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        accuracy = correct / len(held_out)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, held-out accuracy {accuracy:.1%}")
    torch.save(model.state_dict(), "densenet121.pth")  # torchvision's keys: loads there, too
    return accuracy


if __name__ == "__main__":
    main()
