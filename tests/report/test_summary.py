"""The summary of a network: its volumes, parameters, products and depth."""

from __future__ import annotations

import re

import pytest

from densenet_efficient.models.networks import NetworkSpec
from densenet_efficient.report.summary import summarise


def test_the_summary_has_the_papers_volumes() -> None:
    found = summarise(NetworkSpec("densenet121"), batch=2)
    shapes = {volume.name: volume.shape for volume in found.volumes}
    assert shapes["conv0"] == (2, 64, 112, 112) and shapes["denseblock3"] == (2, 1024, 14, 14)
    assert shapes["classifier"] == (2, 1000)
    assert found.parameters == 7_978_856 == sum(volume.parameters for volume in found.volumes)
    assert found.depth == 121 and found.multiply_adds / 2 == pytest.approx(2.834e9, rel=1e-3)
    text = str(found)
    assert "7,978,856 parameters" in text and "dense block, 24 layers" in text
    for depth in (161, 169, 201):  # table 1's own count; its 264 layers are 265
        assert summarise(NetworkSpec(f"densenet{depth}")).depth == depth


def test_the_summary_names_the_blocks_in_order() -> None:
    text = str(summarise(NetworkSpec("densenet121")))
    assert re.findall(r"dense block, (\d+) layers", text) == ["6", "12", "24", "16"]
