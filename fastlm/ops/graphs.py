"""Recording CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def possible(device: torch.device) -> bool:
    """Whether what runs on the device can be recorded."""
    return device.type == "cuda"


def record(
    function: Callable[[], Result], device: torch.device, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of what `function` launches, and what it returned, whose memory the graph's replays fill.

    Other threads may use the GPU meanwhile. (`torch.cuda.graph` would also collect garbage and empty the allocator's
    cache, which takes longer than the recording.)

    Args:
        function: has run before, so that no kernel must be loaded; it must not wait for the GPU.
        device: of its tensors.
        pool: another graph's `pool()`, to share its memory.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            result = function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph, result
