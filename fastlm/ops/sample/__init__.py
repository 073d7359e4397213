"""From the logits of the next token to a token: temperature, top-k, top-p, min-p and the draw, in one pass over memory.

Top-k: Fan et al. (arXiv:1805.04833). Top-p, nucleus sampling: Holtzman et al. (arXiv:1904.09751), section 3.1.
Min-p: Nguyen et al. (arXiv:2407.01082). The random numbers: Philox4x32-10 (see `fastlm.ops.philox`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlm.ops import checks, library, registry
from fastlm.ops.sample import native, reference, triton

MAX_VOCABULARY = 2**22  # csrc/sampling/sample.h: exact sums of integer weights


@torch.no_grad()
def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    rng_state: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of logits.

    Args:
        logits: (B, V), float32, bfloat16 or float16 (float64 on the reference backend), V up to 2^22; -inf is
            never drawn.
        temperature: divides the logits; 0: the first of the largest, without chance.
        top_k: keep the k largest of a row. Ties with the k-th are kept too.
        top_p: of those, keep the smallest set of the most likely whose probabilities sum to top_p or more. Of equally
            likely tokens the first comes first.
        min_p: of those, keep what is at least min_p times as likely as the most likely.
        rng_state: seed and offset of the random numbers, int64 on the logits' device: (2) for all rows, each of which
            draws its own number; or (B, 2), where a row's token depends on nothing but its logits and its state.
        generator: without `rng_state`: what the state is drawn from; None: torch's default generator of the device.

    Returns:
        (B), int64. -1 for a row with a NaN or +inf, or with nothing over -inf. The weights are computed in float32 and
        summed exactly: the same state gives the same token on one backend always, and on another unless its exponential
        differs in the last bit at a boundary. A token less than 2^-40 times as likely as the most likely one is not
        drawn.

    Raises:
        ValueError: a shape, a dtype or an option is out of its range.
        UnsupportedError: the backend that was asked for cannot run the call.
    """
    call = _prepare(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        rng_state=rng_state,
        generator=generator,
    )
    backend = registry.choose("sample", logits.device.type, call)
    if rng_state is None and temperature > 0:
        device = logits.device if generator is None else generator.device
        drawn = torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device, generator=generator)
        call = (*call[:-1], drawn.to(logits.device))
    return _sample(*call, backend)


def check_options(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, where: str = ""
) -> None:
    """ValueError for an option of `sample` that is out of its range; `where` begins the message."""
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"{where}temperature must be 0 (greedy) or positive, got {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"{where}top_k must be an integer of at least 1, or None, got {top_k!r}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"{where}top_p must be in (0, 1], or None, got {top_p}")
    if min_p is not None and not 0.0 <= min_p <= 1.0:
        raise ValueError(f"{where}min_p must be in [0, 1], or None, got {min_p}")


def _prepare(logits, *, temperature=1.0, top_k=None, top_p=None, min_p=None, rng_state=None, generator=None) -> tuple:
    """Check the contract; the arguments of a backend's `sample`."""
    op = "sample"
    if logits.dim() != 2 or not 0 < logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(
            f"{op}: logits must have shape (B, V), V from 1 to {MAX_VOCABULARY}, got {tuple(logits.shape)}"
        )
    checks.floating(op, logits=logits)
    check_options(temperature, top_k, top_p, min_p, where=f"{op}: ")
    if rng_state is not None:
        checks.same_device(op, "logits", logits, rng_state=rng_state)
        if rng_state.dtype != torch.int64 or rng_state.shape not in ((2,), (logits.shape[0], 2)):
            raise ValueError(
                f"{op}: rng_state must be int64 of shape (2) or (B, 2) = ({logits.shape[0]}, 2), got {rng_state.dtype}"
                f" of shape {tuple(rng_state.shape)}"
            )
    kept = 0 if top_k is None or top_k >= logits.shape[1] else top_k
    log_min_p = math.log(min_p) if min_p else -math.inf
    if temperature > 0:  # below that its inverse overflows, and two logits that differ at all are far apart before
        temperature = max(temperature, 1e-20)
    return logits, float(temperature), kept, 1.0 if top_p is None else float(top_p), log_min_p, rng_state


def _sample_impl(logits, temperature, top_k, top_p, log_min_p, rng_state, backend):
    module = registry.implementation("sample", backend)
    return module.sample(logits, temperature, top_k, top_p, log_min_p, rng_state)


def _sample_fake(logits, temperature, top_k, top_p, log_min_p, rng_state, backend):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_sample = library.define(
    "sample(Tensor logits, float temperature, SymInt top_k, float top_p, float log_min_p, Tensor? rng_state,"
    " str backend) -> Tensor",
    _sample_impl,
    _sample_fake,
)

registry.register("sample", _prepare, reference=reference, cpu=native, cuda=native, triton=triton)
