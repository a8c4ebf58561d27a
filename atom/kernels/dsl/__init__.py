"""Device helpers for CuTe DSL kernels; importing one of its modules imports cutlass."""
