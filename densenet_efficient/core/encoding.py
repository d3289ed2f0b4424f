"""A specification as a string, and back: how what a call is travels through a compiled graph.

The string says everything about the call but its tensors, so a graph that is stored, cached on disk
or exported means the same in another process. What a specification holds only while it is called
(the operators, a seed, tensors of constant statistics) is left out; the place of a constant
statistic is marked by True.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from torch import Tensor

from ..ops.convolution import ConvOptions
from .specs import BlockSpec, LayerSpec, NormSpec, PoolSpec

_CLASSES = {cls.__name__: cls for cls in (BlockSpec, LayerSpec, NormSpec, PoolSpec, ConvOptions)}


def encode(spec: Any) -> str:
    """The specification as a string. TypeError where it holds what no string can."""
    return json.dumps(_plain(spec), separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return True
    if type(value).__name__ in _CLASSES:
        fields = {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.name not in ("operators", "programs")
        }
        defaults = {field.name: field.default for field in dataclasses.fields(value)}
        return {type(value).__name__: {k: v for k, v in fields.items() if v != defaults[k]}}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


@functools.lru_cache(maxsize=1024)
def decode(text: str) -> Any:
    """The specification that `encode` was given, without what it left out."""
    return json.loads(text, object_hook=_restored)


def _restored(fields: dict[str, Any]) -> Any:
    name = next(iter(fields), None)
    if name not in _CLASSES:
        return {k: _as_tuple(v) for k, v in fields.items()}
    if name in ("BlockSpec", "PoolSpec"):
        fields[name]["operators"] = None
    return _CLASSES[name](**fields[name])


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
