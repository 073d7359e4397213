"""What the compilers made of the kernels, written into docs/kernels.md: `python -m benchmarks.kernels BACKEND`."""
