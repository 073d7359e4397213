"""The least time of a training step of GPT-2 124M in bf16 by a chip's published limits, written in three ways.

Each part is the time of its matrix products at the chip's rate, or that of the bytes which its operations cannot but
move through the memory, whichever is longer. What PyTorch's operations move is counted one by one from
fastlm/bench/textbook.py under autocast, each tensor once for each operation that reads or writes it; torch.compile is
given every fusion that it is known for. Launches, Python and caches are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.kernels.chips import Chip

BATCH, LENGTH, LAYERS, HEADS, WIDTH, VOCABULARY, PARAMETERS = 16, 1024, 12, 12, 768, 50304, 124_000_000
WAYS = ("fastlm", "eager PyTorch", "torch.compile with SDPA")

# Of the six products of an MLP, by csrc/gemm/gemm_plan.h: four fill 0.94 of 132 multiprocessors' time, the two of the
# weights' gradients, whose k is split, 0.72 with their partial products.
FILLED = 6 / (4 / 0.94 + 2 / 0.72)

TOKENS = BATCH * LENGTH
STREAM = 2.0 * TOKENS * WIDTH  # bytes of a bf16 tensor (B, T, C)
SCORES = float(BATCH * HEADS * LENGTH * LENGTH)  # elements
LOGITS = float(TOKENS * VOCABULARY)  # elements
HEAD_PRODUCT = 2.0 * SCORES * WIDTH / HEADS  # operations of q @ k^T in one layer


@dataclass(frozen=True)
class Part:
    """One part of the step in one way: operations of matrix products, and bytes beside them.

    Args:
        mma_sync: the products go by `mma.sync`, as FlashAttention-2's do; else by the tensor cores' full rate.
        filled: the part of the multiprocessors' time that whole tiles fill; the library's is not known, and taken as 1.
        after: the bytes are moved by operations of their own, not while the products run.
    """

    flops: float = 0.0
    bytes: float = 0.0
    mma_sync: bool = False
    filled: float = 1.0
    after: bool = True

    def seconds(self, chip: Chip) -> float:
        products = self.flops / (chip.tensor_flops * self.filled * (chip.mma_sync if self.mma_sync else 1.0))
        moved = self.bytes / chip.bandwidth
        return products + moved if self.after else max(products, moved)


def parts() -> dict[str, tuple[Part, Part, Part]]:
    """By what they do, in the order of WAYS; forward and backward passes of all layers together."""
    projections = 3 * 2.0 * TOKENS * WIDTH * 4 * WIDTH * LAYERS  # qkv and proj
    mlp = 3 * 2.0 * TOKENS * WIDTH * 8 * WIDTH * LAYERS
    head = 3 * 2.0 * TOKENS * WIDTH * VOCABULARY
    # Two products forward and five backward of the scores that are not masked.
    flash = Part(7 * HEAD_PRODUCT / 2 * LAYERS, 12 * STREAM * LAYERS, mma_sync=True, after=False)
    # Bytes an element, forward: products write and read bf16, scale and mask each read and write it, softmax is in
    # float32 with a conversion on either side. Backward: the same operations, and one more tensor that softmax reads.
    explicit = Part(
        6 * HEAD_PRODUCT * LAYERS, SCORES * (2 + 4 + 4 + 6 + 8 + 6 + 2 + 2 + 2 + 6 + 12 + 6 + 4 + 4 + 4) * LAYERS
    )
    norms = 2 * LAYERS + 1
    # Logits in bf16, an element: eager also converts them, takes their logarithmic softmax in float32, and back.
    in_blocks, eager_loss, fused_loss = 2 + 4 + 4, 2 + 6 + 8 + 12 + 6 + 4, 2 + 2 + 4 + 4
    library = Part(projections)
    return {
        "projections of attention": (library, library, library),
        "attention": (flash, explicit, flash),
        # fastlm keeps the pre-activation; elsewhere the activation's passes are operations of their own.
        "MLP": (
            Part(mlp, 8 * STREAM * LAYERS, filled=FILLED, after=False),
            Part(mlp, (8 + 12) * STREAM * LAYERS),
            Part(mlp, (8 + 12) * STREAM * LAYERS),
        ),
        # x + residual and its norm: 4 tensors forward and 4 backward; apart, 3 and 2 forward, 3 and 3 backward.
        "residual and norms": (Part(0, 8 * STREAM * norms), Part(0, 11 * STREAM * norms), Part(0, 8 * STREAM * norms)),
        "head and loss": (
            Part(head, in_blocks * LOGITS),
            Part(head, eager_loss * LOGITS),
            Part(head, fused_loss * LOGITS),
        ),
        "clipping and AdamW": (Part(0, 32.0 * PARAMETERS), Part(0, 40.0 * PARAMETERS), Part(0, 40.0 * PARAMETERS)),
    }


def rows(chip: Chip) -> list[tuple[str, ...]]:
    """Milliseconds of each part, their sum, and how many times fastlm's the others' are."""
    seconds = {name: [p.seconds(chip) for p in ways] for name, ways in parts().items()}
    table = [(name, *(f"{1e3 * s:.1f}" for s in ways)) for name, ways in seconds.items()]
    totals = [sum(ways[i] for ways in seconds.values()) for i in range(len(WAYS))]
    table.append(("together, ms", *(f"{1e3 * total:.1f}" for total in totals)))
    return [*table, ("of fastlm's", *(f"{total / totals[0]:.2f}x" for total in totals))]
