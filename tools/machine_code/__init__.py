"""What the compiler made of the CUDA kernels, and what a launch of them executes.

The compiler's report and the disassembly give registers, spills and instructions (static.py). For
what is executed, a block's warps are run through the machine code (warp.py) with the parameters of
the launch that the launcher itself makes for a shape (launches.py): integers, addresses and
predicates are followed, so that every loop makes its own trips; what comes from global memory is
unknown, and no way through a kernel depends on it. Each instruction counts for the part of the work
that the function around its source line does (sources.py).

    python -m tools.machine_code --write    renews the tables in docs/kernels.md
"""
