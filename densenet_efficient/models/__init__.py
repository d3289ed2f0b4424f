"""Whole networks by name, and their published weights. May import `reference`, `nn` and below."""
