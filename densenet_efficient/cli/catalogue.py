"""list: the published networks with their errors, the published recipes with their schedules."""

from __future__ import annotations

import argparse
from typing import Any

from ..models.catalogue import CATALOGUE
from ..report.tables import table
from ..train.recipes import PUBLISHED, RECIPES, schedule_text
from .parser import add_command, json_option, print_json

__all__ = ["register"]

ERRORS = ("ImageNet", "ImageNet, cosine", "C10", "C10+", "C100", "C100+", "CamVid")


def register(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "list", "show the published networks, errors and recipes")
    parser.set_defaults(run=_run)
    json_option(parser)


def _run(options: argparse.Namespace, words: list[str]) -> int:
    recipes = {
        **{
            name: (entry.recipe, entry.drop_rate, entry.source) for name, entry in PUBLISHED.items()
        },
        **{name: (recipe, 0.0, f"default for --data {name}") for name, recipe in RECIPES.items()},
    }
    if options.json:
        found = {
            "networks": {
                name: {
                    "network": entry.network.describe(),
                    "parameters": entry.parameters,
                    "errors": entry.errors,
                }
                for name, entry in CATALOGUE.items()
            },
            "recipes": {
                name: {
                    **recipe.describe(),
                    "drop_rate": drop_rate,
                    "schedule_text": schedule_text(recipe),
                    "source": source,
                }
                for name, (recipe, drop_rate, source) in recipes.items()
            },
        }
        print_json(found)
        return 0
    rows = [
        (
            name,
            entry.network.title,
            f"{entry.parameters:,}",
            *(f"{entry.errors[key]:.2f}" if key in entry.errors else "" for key in ERRORS),
        )
        for name, entry in CATALOGUE.items()
    ]
    print("networks, with the published errors in per cent (+: with augmentation)\n")
    print(table(["--model", "network", "parameters", *ERRORS], rows, left=("network",)))
    print("\nrecipes: published ones for train --recipe, and the default of each data set\n")
    described = [
        (
            name,
            recipe.epochs,
            recipe.batch_size,
            schedule_text(recipe),
            "yes" if recipe.augment else "no",
            f"{drop_rate:g}",
            source,
        )
        for name, (recipe, drop_rate, source) in recipes.items()
    ]
    columns = ["recipe", "epochs", "batch", "learning rate", "augmented", "dropout", "source"]
    print(table(columns, described, left=("learning rate", "augmented", "source")))
    return 0
