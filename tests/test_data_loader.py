"""The loader of training windows: what it gives, that nothing but (seed, sample number) decides it, and its state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastlm.data import ByteTokenizer, TokenData, WindowLoader, write_dataset
from fastlm.data.loader import permute
from fastlm.data.streams import StreamLoader


@pytest.fixture
def dataset(tmp_path: Path) -> TokenData:
    """Three shards of different lengths, 1,000 ids and more in all."""
    letters = np.random.default_rng(0)
    texts = ["".join(map(chr, letters.integers(33, 120, n))) for n in (400, 150, 500)]
    write_dataset(iter([("train", t, True) for t in texts]), tmp_path / "d", ByteTokenizer(), shard_tokens=100)
    data = TokenData.open(tmp_path / "d")
    assert [len(a) for a in data.arrays] == [401, 151, 501]
    return data


def batches(loader: WindowLoader, count: int) -> torch.Tensor:
    return torch.stack([torch.stack(loader.next_batch()) for _ in range(count)])


@pytest.mark.parametrize("order", ["random", "shuffled"])
class TestBothOrders:
    def test_windows_come_from_the_text_and_y_is_x_shifted(self, dataset: TokenData, order: str) -> None:
        x, y = WindowLoader(dataset, 64, 16, order=order).next_batch()
        assert x.shape == y.shape == (64, 16)
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous() and y.is_contiguous()
        assert torch.equal(x[:, 1:], y[:, :-1])
        texts = [a.astype(np.uint16).tobytes() for a in dataset.arrays]
        for window in torch.cat([x, y[:, -1:]], 1).numpy().astype(np.uint16):
            assert any(window.tobytes() in text for text in texts)

    def test_a_state_goes_on_exactly(self, dataset: TokenData, order: str) -> None:
        loader = WindowLoader(dataset, 8, 16, seed=5, order=order)
        batches(loader, 7)
        state = loader.state_dict()
        expected = batches(loader, 5)
        other = WindowLoader(dataset, 8, 16, seed=5, order=order)
        other.load_state_dict(state)
        assert torch.equal(batches(other, 5), expected)

    def test_processes_together_see_what_one_sees(self, dataset: TokenData, order: str) -> None:
        one = batches(WindowLoader(dataset, 8, 16, order=order), 6)
        two = [batches(WindowLoader(dataset, 4, 16, order=order, rank=r, world_size=2), 6) for r in range(2)]
        assert torch.equal(torch.cat(two, dim=2), one)

    def test_the_seed_decides(self, dataset: TokenData, order: str) -> None:
        first, same, other = (batches(WindowLoader(dataset, 8, 16, seed=s, order=order), 3) for s in (1, 1, 2))
        assert torch.equal(first, same)
        assert not torch.equal(first, other)

    def test_a_window_may_fill_a_shard(self, dataset: TokenData, order: str) -> None:
        x, y = WindowLoader(dataset, 4, 500, order=order).next_batch()
        assert torch.equal(x[0], torch.from_numpy(dataset.arrays[2][:500].astype(np.int64)))
        assert y[0, -1] == 256

    def test_too_short_a_text_is_refused(self, dataset: TokenData, order: str) -> None:
        with pytest.raises(ValueError, match="501 tokens in one shard, a window of block_size=501 needs 502"):
            WindowLoader(dataset, 4, 501, order=order)


def test_a_shuffled_epoch_has_every_window_once(dataset: TokenData) -> None:
    loader = WindowLoader(dataset, 1, 10, order="shuffled", seed=3)
    epochs = [batches(loader, loader.windows_per_epoch)[:, 0, 0] for _ in range(2)]
    assert loader.windows_per_epoch == 39 + 14 + 49
    for epoch in epochs:
        assert len({tuple(window.tolist()) for window in epoch}) == loader.windows_per_epoch
    assert not torch.equal(epochs[0], epochs[1])


def test_random_starts_are_uniform(dataset: TokenData) -> None:
    loader = WindowLoader(dataset, 5000, 16)
    shard, start = loader._locate(np.arange(40_000, dtype=np.uint64))
    position = start + np.array([0, 401 - 16, 401 - 16 + 151 - 16])[shard]
    counts = np.bincount(position, minlength=loader.windows_per_epoch)
    assert len(counts) == loader.windows_per_epoch == 401 + 151 + 501 - 48
    expected = 40_000 / len(counts)
    chi_squared = ((counts - expected) ** 2 / expected).sum() / len(counts)
    assert 0.85 < chi_squared < 1.15


def test_evaluation_windows_cover_the_text_and_move_nothing(dataset: TokenData) -> None:
    loader = WindowLoader(dataset, 4, 16)
    first, again = list(loader.evaluation_batches(10)), list(loader.evaluation_batches(10))
    assert [weight for _, weight in first] == [4, 4, 2]
    x = torch.cat([x for (x, _), _ in first])
    assert torch.equal(x, torch.cat([x for (x, _), _ in again]))
    assert loader.samples == 0
    assert torch.equal(x[0], torch.from_numpy(dataset.arrays[0][:16].astype(np.int64)))
    assert torch.equal(x[-1], torch.from_numpy(dataset.arrays[2][-17:-1].astype(np.int64)))


@pytest.mark.parametrize("length", [17, 18, 32, 33, 34, 500, 1001])
def test_an_evaluation_reads_a_text_no_more_than_once(tmp_path: Path, length: int) -> None:
    write_dataset(iter([("val", "x" * (length - 1), True)]), tmp_path / "d", ByteTokenizer())
    data = TokenData.open(tmp_path / "d", "val")
    data.arrays = [np.arange(length)]  # so that every token is known by its id
    data.vocab_size = length
    batches = list(WindowLoader(data, 4, 16).evaluation_batches(10**12))
    targets = torch.cat([y for (_, y), _ in batches])
    assert len(targets) == -(-(length - 1) // 16)
    assert sorted(set(targets.flatten().tolist())) == list(range(1, length))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 100, 1000, 4097])
def test_permute_is_a_permutation(n: int) -> None:
    index = np.arange(n, dtype=np.uint64)
    for key in (0, 1, 2**63):
        assert sorted(permute(index, n, key).tolist()) == list(range(n))
    if n > 50:
        assert permute(index, n, 0).tolist() != permute(index, n, 1).tolist()


def test_a_state_of_other_data_is_refused(dataset: TokenData) -> None:
    state = WindowLoader(dataset, 4, 16, seed=1).state_dict()
    for loader in (
        WindowLoader(dataset, 4, 16, seed=2),
        WindowLoader(dataset, 4, 8, seed=1),
        WindowLoader(dataset, 4, 16, seed=1, order="shuffled"),
    ):
        with pytest.raises(ValueError, match="the saved data position has"):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match="tokens=1"):
        WindowLoader(dataset, 4, 16, seed=1).load_state_dict({**state, "tokens": 1})
    with pytest.raises(ValueError, match="seed=None, this loader 1"):
        WindowLoader(dataset, 4, 16, seed=1).load_state_dict({"samples": 3})


def test_another_text_of_the_same_length_is_refused(tmp_path: Path) -> None:
    for end in ("a", "b"):
        write_dataset(iter([("train", "x" * 9000 + end, True)]), tmp_path / end, ByteTokenizer())
    one, other = (TokenData.open(tmp_path / end) for end in ("a", "b"))
    for state, loader in (
        (WindowLoader(one, 4, 16).state_dict(), WindowLoader(other, 4, 16)),
        (StreamLoader(one, 4, 16).state_dict(), StreamLoader(other, 4, 16)),
    ):
        with pytest.raises(ValueError, match=r"has digest='[0-9a-f]+', this loader '[0-9a-f]+': not the same data"):
            loader.load_state_dict(state)
        del state["digest"]  # as before it was written
        loader.load_state_dict({**state, "samples": 8})
        assert loader.samples == 8


def test_bad_arguments_and_damaged_ids(dataset: TokenData) -> None:
    with pytest.raises(ValueError, match="order must be one of random, shuffled, got 'sorted'"):
        WindowLoader(dataset, 4, 16, order="sorted")
    with pytest.raises(ValueError, match="must be positive"):
        WindowLoader(dataset, 0, 16)
    dataset.vocab_size = 50
    with pytest.raises(ValueError, match="damaged: id"):
        WindowLoader(dataset, 16, 16).next_batch()
