"""The self-check refuses what is wrong, and nothing that is right."""

from __future__ import annotations

import torch
from torch import nn

from densenet_efficient import convert
from densenet_efficient.conversion.checks import random_probe
from densenet_efficient.nn.dense_block import DenseBlockExecution
from tests.support.peer import DenseBlock


def test_values_on_the_edge_of_relu_are_no_reason_to_refuse() -> None:
    """What float32 rounds to either side of 0 passes a whole gradient on or none. Here the shift of
    every channel is the negative of one of its values in the check's input; among the values of a
    large network there is one such by chance."""
    block = DenseBlock(1, 64, 4, 8, 0.0)
    values = random_probe(64, 2).double().transpose(0, 1).flatten(1)
    mean, std = values.mean(1), (values.var(1, correction=0) + 1e-5).sqrt()
    with torch.no_grad():
        norm = block["denselayer1"].norm1
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.copy_(-norm.weight.double() * (values[:, 7] - mean) / std)
    model = nn.Sequential(block)
    convert(model)
    assert isinstance(model[0], DenseBlockExecution)


def test_gradients_in_which_everything_cancels_are_no_reason_to_refuse() -> None:
    """As in a network whose scales a sparsity penalty has made tiny, in front of norms that keep
    their own: a batch norm is blind to the shift that all its inputs share, so the gradient of
    norm1's bias is nothing but rounding where every value passes the ReLU."""
    block = DenseBlock(2, 4, 3, 2, 0.0).double()
    with torch.no_grad():
        for layer in block.values():
            layer.norm1.weight.fill_(1e-4)
            layer.norm1.bias.fill_(1.0)
    model = nn.Sequential(block)
    convert(model)
    assert isinstance(model[0], DenseBlockExecution)
