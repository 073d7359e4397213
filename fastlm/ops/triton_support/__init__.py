"""What every op's Triton backend shares: availability, declaring and launching kernels, choosing configurations.

An op's Triton backend is two files in the op's folder:

`triton_kernels.py`: the `@triton.jit` functions, and nothing else. It is imported at the first launch, so that
`import fastlm` needs no Triton. Do not put `from __future__ import annotations` into it.

`triton.py`: the raw functions that the registry calls (`unsupported`, `forward`, `backward` …), which allocate with
torch and launch. It imports no Triton. It declares its kernels:

    FORWARD = Kernel("fastlm.ops.layer_norm.triton_kernels:forward", _candidates)

    def forward(x, …):
        problem = (dtype_name(x), next_power_of_2(width))       # what the choice may depend on: few values, hashable
        config = FORWARD.config(x.device, problem)              # one look-up of a dictionary
        grid = (cdiv(rows, config["ROWS"]), 1, 1)               # always three numbers
        FORWARD(config, grid, x, y, rows, width, x.stride(0), has_bias)

A kernel's parameters come in this order: what the launch hands over one by one, then the constants of the
configuration (`config["ROWS"]`), by name. The rules of the signature, which `Kernel` checks at the first launch:
- pointers (tensors or None; None is a constant, `if bias is not None`) and host-made tensor descriptors have no
  annotation;
- numbers are annotated: `rows: tl.int32`, `stride: tl.int64`, `eps: tl.float32`; constants are `tl.constexpr`.
  The annotation is the type, whatever the value, so no value can make a new kernel. In the interpreter it is not
  applied: multiply a stride by a position that was cast with `.to(tl.int64)`.
- An integer is specialised on whether 16 divides it (which vectorises loads by a stride). What changes from step to
  step (rows, sequence lengths) is named in `@triton.jit(do_not_specialize=[...])`: then it never makes a new kernel.
- A pointer is specialised on whether it is at a multiple of 16 bytes, unless `do_not_specialize_on_alignment` names it:
  for parts of a tensor that begin where the sequence length says.

`_candidates(arch, problem)` returns every configuration that may be chosen there, the best guess first: it is the
shipped table of the architecture and the fallback rule in one place. `arch` is one of `ARCHITECTURES`. Nothing is
measured when a model runs; `fastlm tune` measures the candidates and stores the best in the user's cache, from which
`config` then takes them. Decorate it with `functools.cache`: a configuration is compared by identity.

Each `triton.py` has `examples(device)`, which yields `Example`s: calls of its raw functions that together launch every
kernel with every kind of arguments and every option that makes other code. They are made on the meta device to compile
ahead of time (nothing is computed; the launches are recorded with the very arguments that a real one has), and on the
GPU to tune. Each example is compiled with every candidate for every architecture by
`python -m benchmarks.kernels triton`; a spill or too much shared memory fails, so list only candidates that fit
(`SHARED_BYTES`).

The backend is registered as `triton=triton` in the op's `registry.register`; tests/test_ops.py then runs its cases in
the interpreter, where there is no GPU.

Deterministic to the bit: no atomics whose order can show; partial sums are stored and added up by a second kernel, in a
fixed order (`column_sum.py`). No host synchronisation, and no allocation outside torch's: the kernels work inside CUDA
graphs.
"""

from fastlm.ops.triton_support.availability import INTERPRETED, unavailable
from fastlm.ops.triton_support.kernel import Config, Example, Kernel
from fastlm.ops.triton_support.sizes import FLOATS, cdiv, dtype_name, next_power_of_2
from fastlm.ops.triton_support.target import ARCHITECTURES, SHARED_BYTES, architecture, multiprocessors

__all__ = [
    "ARCHITECTURES",
    "FLOATS",
    "INTERPRETED",
    "SHARED_BYTES",
    "Config",
    "Example",
    "Kernel",
    "architecture",
    "cdiv",
    "dtype_name",
    "multiprocessors",
    "next_power_of_2",
    "unavailable",
]
