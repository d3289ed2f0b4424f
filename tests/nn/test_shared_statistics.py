"""`torch.nn.SyncBatchNorm` on the operators: several processes, each with a part of the batch,
together do what one does that has it all."""

import pytest
import torch

from tests.support.processes import results_of
from tests.support.shared_steps import (
    CASES,
    other_orders,
    plain_network,
    run,
    step,
    whole_batch,
)

pytestmark = pytest.mark.slow  # the processes start


@pytest.fixture(scope="module")
def found():
    return results_of(run, 4)


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_one_process_with_the_whole_batch(name, found):
    case = CASES[name]
    expected = step(plain_network(case), whole_batch(case))
    parts = [found[rank]["cases"][name][0] for rank in range(len(case.batches))]
    buffers = {key for key, _ in plain_network(case).named_buffers()}
    assert all(part.keys() == expected.keys() for part in parts)
    together = {}
    for key in expected:
        values = [part[key] for part in parts]
        if key in buffers:
            assert all(torch.equal(value, values[0]) for value in values), key
            together[key] = values[0]
        else:
            together[key] = torch.cat(values) if key in ("y", "dx") else sum(values)
    torch.testing.assert_close(together, expected, rtol=1e-9, atol=1e-9)


def test_other_orders_of_backward_passes_give_the_same(found):
    case = CASES["two processes"]
    expected = other_orders(plain_network(case), whole_batch(case))
    first, second = (found[rank]["other orders"] for rank in range(2))
    together = {
        name: {key: first[name][key] + second[name][key] for key in gradients}
        for name, gradients in expected.items()
    }
    torch.testing.assert_close(together, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_every_process_issues_the_same_collectives(name, found):
    calls = [found[rank]["cases"][name][1] for rank in range(len(CASES[name].batches))]
    assert all(own == calls[0] for own in calls)


def test_a_channel_is_exchanged_once_forward_and_once_backward(found):
    """Two numbers each time, whatever number of layers read it; and rows are counted for the stem
    and either block."""
    stem, growth, bottleneck, transition = 8 + 8, 4, 16, 8
    channels = stem + transition + (2 + 3) * (growth + bottleneck)
    steps, item = 2, 8
    size = sum(size for _, size in found[0]["cases"]["two processes"][1])
    assert size == steps * (2 * 2 * channels + 3) * item


def test_the_bottleneck_computed_again_is_not_exchanged_again(found):
    cases = found[0]["cases"]
    assert cases["two processes"][1] == cases["two processes, store"][1]


def test_nothing_is_exchanged_in_eval_mode(found):
    assert not found[0]["cases"]["eval mode"][1]


def test_a_stage_whose_gradient_may_be_seen_leaves_no_correction_to_another(found):
    """The transition's norm and the last one then exchange two sums a channel themselves, in each
    of two steps; after a backward hook, which makes another tensor, two moments and the number of
    rows as well."""
    sizes = {name: sum(size for _, size in found[0]["cases"][name][1]) for name in CASES}
    steps, norms, channels, item = 2, 2, 16 + 20, 8
    sums = steps * 2 * channels * item
    assert sizes["forward hooks"] - sizes["two processes"] == sums
    assert sizes["backward hooks"] - sizes["two processes"] == 2 * sums + steps * norms * item


def test_explain_says_how_many_processes_share(found):
    lines = found[0]["explained"].splitlines()
    assert (
        sum("in training, statistics are shared between 2 processes" in line for line in lines) > 3
    )


def test_what_cannot_be_right_is_refused_in_one_sentence(found):
    refused = found[0]["refused"]
    assert "first derivatives only" in refused["graph"]
    assert "over different processes" in refused["two groups"]
    assert "input must be on a GPU" in refused["hook"] and "carries a hook" in refused["hook"]


def test_variances_of_channels_far_from_zero_are_not_lost(found):
    offsets = torch.arange(4, dtype=torch.float64) / 64
    expected = torch.stack((1e4 + offsets.mean(), 1e-4 + offsets.var(correction=0)))
    for rank in range(4):
        torch.testing.assert_close(
            found[rank]["moments"][:, 0].double(), expected, rtol=1e-4, atol=0
        )
