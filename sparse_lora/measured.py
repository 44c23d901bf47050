"""Where the Triton kernels were measured; written by `python benchmarks/triton_kernels.py --record FILE.json`."""

# Compute capability of a GPU -> time of a linear's weight and gradients with the kernels, relative to plain PyTorch.
RELATIVE_TIMES: dict[str, float] = {}
