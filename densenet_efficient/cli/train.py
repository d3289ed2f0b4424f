"""train: a network on a data set, by the papers' recipes; logs, checkpoint and weights."""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from ..models.networks import CIFAR, NetworkSpec
from ..models.pretrained import load_weights
from ..nn.options import MEMORY_MODES
from ..ops.dtypes import AUTOCAST
from ..train import distributed
from ..train.capacity import largest_batch, run_state_bytes
from ..train.checkpoint import CheckpointError, evaluated_state, read_checkpoint
from ..train.data import Data, load_data
from ..train.evaluation import evaluate
from ..train.finetuning import start_from
from ..train.recipes import PUBLISHED, Recipe, recipe_for
from ..train.trainer import CHECKPOINT, Trainer, TrainingOptions
from .parser import Parser, add_command, is_small, network_from
from .train_options import AUTO, OUT, add_options, recipe_values

__all__ = ["register"]


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "train", "train a network; logs, checkpoint and weights go into --out"
    )
    parser.set_defaults(run=functools.partial(_run, parser))
    add_options(parser)


def _run(parser: Parser, options: argparse.Namespace, words: list[str]) -> int:
    recipe = None
    if options.resume is not None:
        options, recipe, words = _resumed(parser, options, words)
    with distributed.joined(options.device) as device:
        options.device = device
        return _run_joined(options, recipe, words)


def _run_joined(options: argparse.Namespace, recipe: Recipe | None, words: list[str]) -> int:
    out = options.out or OUT
    execution = "reference" if options.reference else options.memory or MEMORY_MODES[0]
    if options.reference and options.memory:
        raise ValueError(f"memory: expected without --reference, got {options.memory!r} with it")
    if options.test_only and options.weights is None and options.resume is None:
        raise ValueError("test_only: expected with --weights or --resume, got neither")
    name, *rest = options.data
    if len(rest) > 1 or (name == "imagefolder") != bool(rest):
        raise ValueError(
            f"data: expected one name, or imagefolder and its PATH, got {' '.join(options.data)!r}"
        )
    options.model = options.model or ("densenet121" if name == "imagefolder" else CIFAR)
    if options.recipe and PUBLISHED[options.recipe].drop_rate and options.drop_rate is None:
        options.drop_rate, options.drop_everywhere = PUBLISHED[options.recipe].drop_rate, True
    values = recipe_values(options)
    recipe = recipe or recipe_for(options.recipe or name, **values)
    load = functools.partial(_load, options, name, rest[0] if rest else None, recipe)
    data = distributed.first_alone(load)
    network = network_from(options, data.num_classes, data.channels)
    if options.batch_size == AUTO and options.resume is None:
        recipe = _as_large_as_fits(options, recipe, network, execution, data)
    if options.test_only:
        return _test(options, recipe, network, execution, data)
    trainer = Trainer(
        TrainingOptions(
            network=network,
            recipe=recipe,
            out=out,
            execution=execution,
            amp=options.amp,
            device=options.device,
            channels_last=not options.contiguous,
            weights=options.weights,
            freeze=tuple(options.freeze),
            sync_batch_norm=options.sync_batch_norm,
            cuda_graph=options.cuda_graph,
            seed=options.seed,
            deterministic=options.deterministic,
            resume=None if options.resume is None else Path(options.resume),
            overwrite=options.overwrite,
            workers=options.workers,
            tensorboard=options.tensorboard,
            profile=options.profile,
            memory_snapshot=options.memory_snapshot,
            progress=not options.quiet,
            arguments=tuple(words),
        ),
        data,
    )
    try:
        history = trainer.run()
    except KeyboardInterrupt as interrupt:
        _release(interrupt)
        saved = f"continue them with --resume {trainer.checkpoint}" if trainer.epoch else "none"
        print(f"\ninterrupted; epochs finished: {trainer.epoch}; {saved}", file=sys.stderr)
        return 130
    best = max(history, key=lambda row: row["test_accuracy"])
    _say(
        f"{network.title} on {data.name}: held-out accuracy "
        f"{history[-1]['test_accuracy']:.2%} (best {best['test_accuracy']:.2%} after epoch "
        f"{best['epoch']}); weights in {out / 'model.safetensors'}, the best in "
        f"{out / 'best.safetensors'}"
    )
    return 0


def _release(error: BaseException) -> None:
    """Lets go of what an error's frames hold, without a word: a loader interrupted while it started
    its workers would complain of what it does not have yet."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _say(text: str) -> None:
    if distributed.is_first():
        print(text)


def _as_large_as_fits(
    options: argparse.Namespace,
    recipe: Recipe,
    network: NetworkSpec,
    execution: str,
    data: Data,
) -> Recipe:
    """The recipe with the largest batch that --budget holds in every process, and, unless it was
    given, the learning rate in proportion."""
    device = torch.device(options.device)
    model = network.build(execution).to(device)
    room = options.budget.bytes_on(device) - run_state_bytes(model, recipe)
    image = (data.channels, data.image_size, data.image_size)
    dtype = AUTOCAST.get(options.amp or "", torch.float32)
    try:
        part = largest_batch(model, image, dtype, room, parts=recipe.accumulate)
    except TypeError as error:
        raise ValueError(
            "batch_size: expected a number with --reference, whose memory has no plan, got auto"
        ) from error
    least = min(recipe.accumulate, 2)  # images in a part, see Recipe.parts
    if part < least:
        images = "one image" if least == 1 else "two images in each part"
        raise ValueError(
            f"budget: expected one that holds a step with {images}, got {options.budget.text}"
        )
    processes = distributed.process_count()
    share = len(data.train) // processes  # type: ignore[arg-type]
    batch = min(part * recipe.accumulate, share) * processes
    rate = recipe.learning_rate * batch / recipe.batch_size
    given = options.learning_rate is not None
    return recipe.replaced(batch_size=batch, learning_rate=None if given else rate)


def _test(
    options: argparse.Namespace, recipe: Recipe, network: NetworkSpec, execution: str, data: Data
) -> int:
    """Evaluate weights, or what a checkpoint's run evaluates."""
    model = network.build(execution)
    if options.resume is not None:
        source = options.resume
        state = evaluated_state(read_checkpoint(source))
        load_weights(model, state, source=f"checkpoint {source}")
    else:
        source = options.weights
        if not start_from(model, network, source):
            raise ValueError(
                f"weights: expected a classifier of {data.num_classes} classes, those of "
                f"{data.name}, got another in {source}"
            )
    device = torch.device(options.device)
    layout = torch.contiguous_format if options.contiguous else torch.channels_last
    loss, accuracy = evaluate(
        model.to(device=device, memory_format=layout),  # type: ignore[call-overload]
        data.test,
        batch_size=recipe.batch_size,
        device=device,
        memory_format=layout,
        amp=options.amp,
        workers=options.workers,
    )
    _say(
        f"{network.title} on {data.name}, weights of {source}: held-out accuracy {accuracy:.2%}, "
        f"loss {loss:.4f}"
    )
    return 0


def _resumed(
    parser: Parser, options: argparse.Namespace, words: list[str]
) -> tuple[argparse.Namespace, Recipe, list[str]]:
    """The checkpoint's options, with those that are given now in their place, its recipe likewise,
    and all words together. Without --out, a FILE's run goes on in its folder."""
    file = Path(options.resume) if options.resume else (options.out or OUT) / CHECKPOINT
    out = options.out or file.parent
    state = read_checkpoint(file)
    words = [*state["arguments"], *words]
    try:
        recipe = Recipe.from_description(state["description"].get("recipe"))
        found = parser.parse_args(words)
    except (ValueError, SystemExit) as error:
        raise CheckpointError(f"checkpoint {file}: its options cannot be read: {error}") from error
    found.resume, found.out = str(file), out
    return found, recipe.replaced(**recipe_values(options)), words


def _load(options: argparse.Namespace, name: str, path: str | None, recipe: Recipe) -> Data:
    return load_data(
        name,
        root=options.data_root,
        path=path,
        image_size=options.image_size,
        augment=recipe.augment,
        randaugment=recipe.randaugment,
        download=options.download,
        limit=options.limit,
        shape=(3, 10 if is_small(options.model) else 1000),
    )
