"""The numbers: formats, granularity, schemes, rounding, packing, permutation and rotation. Pure torch.

The rounding code here is the single numerical truth: calibration writes with it, kernels are tested against it, and
the CPU path runs it.
"""
