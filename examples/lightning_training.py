"""Lightning trains it: a converted DenseNet is a module like any other.

pip install lightning
python examples/lightning_training.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split
from torchvision import datasets, models
from torchvision.transforms import v2

import densenet_efficient


class Classifier(lightning.LightningModule):
    """DenseNet-121 with a cross entropy, SGD and a cosine schedule."""

    def __init__(self, classes: int, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = models.densenet121(num_classes=classes)
        densenet_efficient.convert(self.network)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("loss", nn.functional.cross_entropy(logits, labels), sync_dist=True)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        rate: float = self.hparams["learning_rate"]
        optimizer = torch.optim.SGD(self.parameters(), rate, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main(arguments: Sequence[str] | None = None) -> lightning.Trainer:
    """Train on generated images; replace them by yours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--precision", default="32-true", help="Lightning's, such as bf16-mixed")
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step")
    options = parser.parse_args(arguments)

    pixels = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    shape = (3, options.image_size, options.image_size)
    images = datasets.FakeData(options.images, shape, num_classes=10, transform=pixels)
    train, held_out = random_split(images, [0.75, 0.25])
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        precision=options.precision,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
    )
    trainer.fit(
        Classifier(classes=10, learning_rate=options.learning_rate),
        DataLoader(train, options.batch_size, shuffle=True, drop_last=True),
        DataLoader(held_out, options.batch_size),
    )
    return trainer


if __name__ == "__main__":
    main()
