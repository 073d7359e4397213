"""One command for a machine with an NVIDIA GPU: `python -m benchmarks.gpu` proves and measures the CUDA kernels.

Every part runs in a process of its own, with a budget of seconds: what fails, or is cut off, leaves the other parts and
its own results so far. Where there is no GPU it does what can be done, and says of each other part why it was left out.
"""
