"""Shapes of operators that tests of several backends share."""

from __future__ import annotations

# (operator, sizes) without a single row.
EMPTY = [
    ("channel_stats", (0, 12)),
    ("norm_correction_apply", (0, 12)),
    ("stem_forward", (0, 4, 4, 8)),
    ("stem_backward", (0, 4, 4, 8)),
    ("transition_forward", (0, 4, 4, 8, 4)),
    ("transition_backward", (0, 4, 4, 8, 4)),
    ("norm_relu_conv1x1_forward", (0, 8, 4)),
    ("norm_relu_conv1x1_backward", (0, 8, 4)),
    ("norm_relu_conv3x3_forward", (0, 4, 4, 8, 4)),
    ("norm_relu_conv3x3_backward", (0, 4, 4, 8, 4)),
]
