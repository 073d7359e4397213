"""The kernel of AdamW: one pass over a parameter, its gradient and its moments."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size"])
def step(
    p,  # (size): what is updated, the float32 master where there is one
    grad,  # (size)
    exp_avg,  # (size) float32
    exp_avg_sq,  # (size) float32
    max_exp_avg_sq,  # (size) float32, or None
    shadow,  # (size): the parameter whose master is updated, or None
    scale,  # one float32, a further factor on the gradient; or None
    size: tl.int64,
    grad_scale: tl.float32,
    decay: tl.float32,  # 1 - lr * weight_decay
    beta1: tl.float32,
    rest1: tl.float32,  # 1 - beta1
    beta2: tl.float32,
    rest2: tl.float32,
    step_size: tl.float32,  # lr / (1 - beta1^step)
    correction2: tl.float32,  # 1 - beta2^step
    eps: tl.float32,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * grad_scale
    if scale is not None:
        g *= tl.load(scale)
    w = tl.load(p + place, mask=inside, other=0.0).to(tl.float32) * decay
    m = tl.load(exp_avg + place, mask=inside, other=0.0) * beta1 + rest1 * g
    v = tl.load(exp_avg_sq + place, mask=inside, other=0.0) * beta2 + rest2 * g * g
    tl.store(exp_avg + place, m, mask=inside)
    tl.store(exp_avg_sq + place, v, mask=inside)
    if max_exp_avg_sq is not None:
        largest = tl.load(max_exp_avg_sq + place, mask=inside, other=0.0)
        # A NaN stays one, as in torch.maximum.
        v = tl.where((v > largest) | (v != v), v, largest)
        tl.store(max_exp_avg_sq + place, v, mask=inside)
    w -= step_size * (m / (tl.sqrt_rn(v / correction2) + eps))
    tl.store(p + place, w.to(p.dtype.element_ty), mask=inside)
    if shadow is not None:
        tl.store(shadow + place, w.to(shadow.dtype.element_ty), mask=inside)
