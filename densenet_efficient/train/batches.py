"""Batches: which images, in which order, in which process; and their way to the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from . import distributed
from .data import DataError
from .interrupts import held_back

__all__ = ["held_out_batches", "on_device", "training_batches"]


def training_batches(
    dataset: Dataset, batch_size: int, *, seed: int, epoch: int, workers: int, pin: bool
) -> DataLoader:
    """This process' share of an epoch's batches of (images, labels), in an order that follows from
    `seed` and `epoch` alone. batch_size: of all processes together. Every process gets as many: the
    last images are completed by the first. A last batch of one image is dropped, as batch
    statistics over one value need not exist."""
    processes = distributed.process_count()
    own = batch_size // processes
    sampler: DistributedSampler = DistributedSampler(
        _not_empty(dataset), processes, distributed.rank(), seed=seed
    )
    sampler.set_epoch(epoch)
    return DataLoader(
        dataset,
        batch_size=own,
        sampler=sampler,
        drop_last=len(sampler) % own == 1 and len(sampler) > 1,
        num_workers=workers,
        pin_memory=pin,
        # Of the workers' seeds.
        generator=torch.Generator().manual_seed((seed + epoch) * processes + distributed.rank()),
    )


def held_out_batches(dataset: Dataset, batch_size: int, *, workers: int, pin: bool) -> DataLoader:
    """This process' share of all images, each image in one process."""
    images: Dataset = _not_empty(dataset)
    processes = distributed.process_count()
    if processes > 1:
        size = len(dataset)  # type: ignore[arg-type]
        images = Subset(dataset, range(distributed.rank(), size, processes))
    return DataLoader(
        images,
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),  # not the global one, which training draws from
    )


def _not_empty(dataset: Dataset) -> Dataset:
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise DataError("data: expected at least one image, got none")
    return dataset


def on_device(
    batches: DataLoader, device: torch.device, memory_format: torch.memory_format
) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches on the device: images [n, C, H, W] in the memory format, labels [n]."""
    for images, labels in _loaded(batches):
        images = images.to(device, non_blocking=True, memory_format=memory_format)
        yield images, labels.to(device, non_blocking=True)


def _loaded(batches: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches. A ctrl-C waits for the loader. A worker process passes its error on as
    text with a traceback in front, which is left out."""
    try:
        with held_back():
            iterator = iter(batches)
        while True:
            with held_back():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch
    except DataError as error:
        raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from error
