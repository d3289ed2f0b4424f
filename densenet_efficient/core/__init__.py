"""The algorithm on tensors: what a call is, memory layout, shared scratch, the dense block forward
and backward, and its autograd functions. May import `ops`."""
