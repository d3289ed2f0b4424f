"""Benchmarks: peers next to each other, agreement before speed. May import `models`, `memory` and
below."""
