"""The builders under the names of TF-Slim, Keras and Dive into Deep Learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from densenet_efficient.cli.main import main
from densenet_efficient.models import d2l, keras, slim
from tests.support import zoo_plain


def test_slim_names_its_end_points() -> None:
    model = slim.densenet_X([1, 2], growth_rate=4, num_classes=5)
    net, points = model.net_and_end_points(torch.randn(2, 3, 32, 32))
    assert list(points) == [
        "conv1", "dense_block1", "transition_block1", "dense_block2", "final_block", "global_pool",
        "logits", "predictions",
    ]  # fmt: skip
    assert net is points["logits"] and net.shape == (2, 5)
    features = slim.densenet_X([1, 2], growth_rate=4, num_classes=None, global_pool=False)
    assert features.net_and_end_points(torch.randn(2, 3, 32, 32))[0].shape == (2, 14, 4, 4)


def test_slim_networks_have_the_published_size() -> None:
    sizes = {"121": 7_978_856, "161": 28_681_000, "169": 14_149_480, "201": 20_013_928}
    with torch.device("meta"):
        for name, expected in sizes.items():
            model = getattr(slim, f"densenet_{name}")()
            assert sum(p.numel() for p in model.parameters()) == expected


def blocks(model: torch.nn.Module) -> list[int]:
    children = model.get_submodule("features").named_children()
    return [len(list(block.children())) for name, block in children if "denseblock" in name]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"depth": 40}, [12, 12, 12]),
        ({"depth": 40, "bottleneck": True}, [6, 6, 6]),
        ({"depth": [1, 2], "nb_dense_block": 2}, [1, 2]),
        ({"nb_layers_per_block": 2, "nb_dense_block": 4}, [2, 2, 2, 2]),
        ({"nb_layers_per_block": [3, 1, 2]}, [3, 1, 2]),
    ],
)
def test_keras_counts_layers_by_depth_or_list(options: dict[str, Any], expected: list[int]) -> None:
    assert blocks(keras.DenseNet(**options)) == expected


def test_keras_reduction_epsilon_top_and_weight_decay() -> None:
    model = keras.DenseNet(depth=10, nb_dense_block=3, growth_rate=4, reduction=0.5, classes=7)
    assert model.features.transition1.conv.out_channels == (8 + 2 * 4) // 2
    assert model.features.norm5.eps == 1.1e-5 and model.classifier.out_features == 7
    decayed, others = model.parameter_groups()
    assert decayed["weight_decay"] == 2e-4 and others["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    x = torch.randn(2, 3, 16, 16)
    body = keras.DenseNet(depth=10, growth_rate=4, include_top=False)
    assert body(x).shape == (2, body.num_features, 4, 4)
    pooled = keras.DenseNet(depth=10, growth_rate=4, include_top=False, pooling="avg")
    assert pooled(x).shape == (2, body.num_features)
    with torch.device("meta"):
        network = keras.DenseNet121()
    assert sum(p.numel() for p in network.parameters()) == 7_978_856
    assert network.features.norm0.eps == 1.001e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 41}, r"depth must be 3 \* N \+ 4"),
        ({"depth": 43, "bottleneck": True}, r"depth must be 6 \* N \+ 4"),
        ({"depth": [2, 2]}, "nb_dense_block must be the 2 blocks listed, got 3"),
        ({"reduction": 1.5}, "reduction must be at least 0 and below 1, got 1.5"),
        ({"reduction": 1.0}, "reduction must be at least 0 and below 1, got 1.0"),
        ({"pooling": "median"}, "pooling must be None or 'avg', got 'median'"),
        ({"weight_decay": -1.0}, "weight_decay must be finite"),
        ({"classes": 0}, "classes must be an integer of at least 1, got 0"),
    ],
)
def test_keras_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keras.DenseNet(**options)


def test_the_books_block_is_the_books() -> None:
    """The same modules in the same order, under other names."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    theirs = zoo_plain.BookBlock(2, 10).double()
    assert theirs(x).shape == (2, 23, 6, 6)  # its lazy modules exist from here on
    ours = d2l.DenseBlock(2, 10, in_channels=3).double()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in d2l.DenseNet().parameters()) == 758_226


def test_summary_draws_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["summary", "--model", "densenet_cifar", "--depth", "10", "--figure"]
    assert main([*command, str(tmp_path / "volumes.png")]) == 0
    assert (tmp_path / "volumes.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, str(tmp_path / "volumes.doc")]) == 2
    assert "doc" in capsys.readouterr().err
