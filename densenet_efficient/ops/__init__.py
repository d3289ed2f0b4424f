"""The operators: the compiled kernels, the fallback through PyTorch's own operators, and the choice
between them. Imports nothing of the package but its version."""
