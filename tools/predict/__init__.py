"""What a training step takes on a GPU, by count: milliseconds of every kernel and of the step, for
a named network, batch, memory mode and device, without a GPU.

The operators' calls of a step (calls.py) go through the launchers' own tilings, which give each
launch's blocks, tiles, warps and waves (launches.py). Executed instructions of a tile are counted
in the machine code by tools/machine_code and stored here (counts.py). The model (model.py) turns
them into time with a few efficiencies, which are fitted to measured kernels (fit.py).
docs/predict.md says how far it can be trusted.

    python -m tools.predict --network densenet121 --batch 512 --gpu h200
"""
