"""The pool of memory for large CPU tensors."""

from __future__ import annotations

import gc
import itertools
import random
import threading
from collections.abc import Iterator

import pytest
import torch

from fastlm import ops
from fastlm.ops import memory, native

pytestmark = pytest.mark.skipif(native.C is None, reason="fastlm._C is not built")
LARGE = (1024, 768)  # 3 MB in float32


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    gc.collect()
    before = memory.state().limit
    memory.release()
    yield
    memory.set_limit(before)


@pytest.mark.parametrize("dtype", list(native.DTYPE_CODE))
def test_a_tensor_of_the_pool_is_an_ordinary_tensor(dtype: torch.dtype) -> None:
    t = memory.empty((3, *LARGE), dtype)
    assert t.shape == (3, *LARGE) and t.dtype == dtype and t.is_contiguous() and t.device.type == "cpu"
    assert t.data_ptr() % 64 == 0
    t.normal_().requires_grad_()
    (t * 2).sum().backward()
    assert torch.equal(t.grad, torch.full_like(t, 2))


def test_memory_comes_back_and_is_given_again() -> None:
    first = memory.empty(LARGE, torch.float32)
    address, before = first.data_ptr(), memory.state()
    del first
    assert memory.state().unused == before.unused + before.used
    again = memory.empty(LARGE, torch.float32)
    assert again.data_ptr() == address
    assert memory.state().reused == before.reused + 1 and memory.state().fresh == before.fresh


def test_a_view_keeps_the_memory() -> None:
    view = memory.empty(LARGE, torch.float32).fill_(7.0)[5]
    gc.collect()
    other = memory.empty(LARGE, torch.float32).fill_(1.0)
    assert torch.equal(view, torch.full((LARGE[1],), 7.0)) and other.data_ptr() != view.data_ptr()


def test_a_block_is_cut_and_its_parts_are_one_again() -> None:
    large = memory.empty((4, *LARGE), torch.float32)
    address, fresh = large.data_ptr(), memory.state().fresh
    del large
    parts = [memory.empty(LARGE, torch.float32) for _ in range(4)]
    assert [p.data_ptr() for p in parts] == [address + i * parts[0].nbytes for i in range(4)]
    del parts[1], parts[2], parts[0], parts[0]  # the second, the last, the first, the third
    large = memory.empty((4, *LARGE), torch.float32)
    assert large.data_ptr() == address and memory.state().fresh == fresh


def test_a_block_grows_into_memory_that_was_never_used() -> None:
    used, block = memory.state().used, memory.empty(LARGE, torch.float32)
    address, size = block.data_ptr(), block.nbytes
    del block
    larger = memory.empty((2, *LARGE), torch.float32)
    assert larger.data_ptr() == address
    assert memory.state().unused == 0 and memory.state().used == used + 2 * size


def test_the_smallest_hole_is_taken_and_of_equal_ones_the_youngest() -> None:
    tensors = [memory.empty((n, *LARGE), torch.float32) for n in (1, 3, 1, 2, 1, 2, 1)]
    older, younger = tensors[3].data_ptr(), tensors[5].data_ptr()
    for i in (3, 1, 5):  # holes of 2, 3 and 2, with a tensor between each two
        tensors[i] = torch.empty(0)
    first, second = (memory.empty((2, *LARGE), torch.float32) for _ in range(2))
    assert (first.data_ptr(), second.data_ptr()) == (younger, older)


@pytest.mark.parametrize("last", [0, 2])
def test_a_small_hole_is_taken_from_its_younger_end(last: int) -> None:
    tensors = [memory.empty(LARGE, torch.float32) for _ in range(3)]
    addresses = [t.data_ptr() for t in tensors]
    for i in (1, 2 - last, last):
        tensors[i] = None  # type: ignore[call-overload]
    assert memory.empty(LARGE, torch.float32).data_ptr() == addresses[last]


def test_a_large_hole_is_taken_from_its_low_end() -> None:
    tensors = [memory.empty(LARGE, torch.float32) for _ in range(8)]
    address = tensors[0].data_ptr()
    while tensors:
        del tensors[0]  # the last one lies at the high end
    assert memory.empty(LARGE, torch.float32).data_ptr() == address


def test_tensors_never_overlap() -> None:
    draw, before = random.Random(0), memory.state().used
    alive: dict[int, torch.Tensor] = {}
    for i in range(2000):
        if i == 1000:
            memory.set_limit(32 << 20)
        if alive and (len(alive) > 20 or draw.random() < 0.3):
            dying = draw.choice(list(alive))
            assert bool((alive.pop(dying)[:: 1 << 12] == dying).all())
        size = draw.randrange(memory.POOLED_BYTES, 4 << 20) // 4
        alive[i] = memory.empty((size,), torch.float32)
        alive[i][:: 1 << 12] = i
        spans = sorted((t.data_ptr(), t.nbytes) for t in alive.values())
        assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(spans))
    alive.clear()
    assert memory.state().used == before and memory.state().unused <= 32 << 20


def test_no_more_than_the_limit_is_kept() -> None:
    tensors = [memory.empty(LARGE, torch.float32) for _ in range(4)]
    size = tensors[0].nbytes
    memory.set_limit(2 * size)
    del tensors
    assert memory.state().unused == 2 * size
    memory.set_limit(0)
    assert memory.state().unused == 0
    with pytest.raises(ValueError, match="0 or more bytes, got -1"):
        memory.set_limit(-1)


def test_an_unused_capsule_gives_its_memory_back() -> None:
    used = memory.state().used
    capsule = native.C.pooled_tensor(LARGE, 0)
    assert memory.state().used > used
    del capsule
    assert memory.state().used == used


def test_small_tensors_and_other_dtypes_are_torchs() -> None:
    taken = memory.state().fresh + memory.state().reused
    memory.empty((4, 4), torch.float32)
    memory.empty(LARGE, torch.float64)
    assert memory.state().fresh + memory.state().reused == taken


def test_more_than_there_is() -> None:
    with pytest.raises(MemoryError):
        memory.empty((1 << 47,), torch.float32)


def test_threads() -> None:
    def work(value: float) -> None:
        for _ in range(50):
            t = memory.empty(LARGE, torch.float32)
            t[::128].fill_(value)
            wrong.extend([value] if not bool((t[::128] == value).all()) else [])

    wrong: list[float] = []
    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_training_loop_takes_no_fresh_memory_after_its_first_step() -> None:
    x, weight = torch.randn(LARGE, requires_grad=True), torch.ones(LARGE[1], requires_grad=True)
    upstream = torch.randn(LARGE)
    for step in range(3):
        y = ops.layer_norm(x, weight)
        torch.autograd.grad(y, (x, weight), upstream)
        if step == 0:
            fresh = memory.state().fresh
    assert memory.state().fresh == fresh
