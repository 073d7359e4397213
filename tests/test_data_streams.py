"""Streams: every row reads its part of the text in order; positions, processes, shards and bad input."""

from __future__ import annotations

import numpy as np
import pytest

from fastlm.data import ByteTokenizer, TokenData, write_dataset
from fastlm.data.streams import StreamLoader


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """1,001 ids in several shards."""
    folder = tmp_path_factory.mktemp("streams") / "d"
    pieces = (("train", "".join(chr(97 + (i * k) % 26) for i in range(99)), True) for k in range(1, 11))
    write_dataset(pieces, folder, ByteTokenizer(), shard_tokens=300)
    loaded = TokenData.open(folder)
    assert len(loaded.arrays) > 2
    return loaded


def test_each_row_reads_its_part_in_order(data: TokenData) -> None:
    text = np.concatenate(data.arrays).astype(np.int64)
    loader = StreamLoader(data, 4, 10)
    part = (len(text) - 1) // 4
    for window in range(part // 10):
        batch = loader.next_batch()
        assert (batch["stream"], batch["fresh"]) == (0, window == 0)
        for row in range(4):
            start = row * part + window * 10
            assert batch["x"][row].tolist() == text[start : start + 10].tolist()
            assert batch["y"][row].tolist() == text[start + 1 : start + 11].tolist()
    again = loader.next_batch()  # the next pass over the text
    assert again["fresh"] and again["x"][0].tolist() == text[:10].tolist()


def test_a_position_goes_on_and_knows_its_data(data: TokenData) -> None:
    loader, other = StreamLoader(data, 4, 10), StreamLoader(data, 4, 10)
    for _ in range(5):
        loader.next_batch()
    other.load_state_dict(loader.state_dict())
    assert other.next_batch()["x"].tolist() == loader.next_batch()["x"].tolist()
    with pytest.raises(ValueError, match="rows=4, this loader 5"):
        StreamLoader(data, 5, 10).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="rows=None, this loader 4"):
        loader.load_state_dict({"samples": 3, "seed": 0})


def test_processes_and_accumulated_batches_share_the_rows(data: TokenData) -> None:
    one = StreamLoader(data, 8, 10)
    split = [StreamLoader(data, 2, 10, accumulation=2, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(4):
        whole = one.next_batch()
        parts = [loader.next_batch() for _ in range(2) for loader in split]
        assert [p["stream"] for p in parts] == [0, 0, 1, 1]
        assert [row for p in parts for row in p["x"].tolist()] == whole["x"].tolist()
        assert {p["fresh"] for p in parts} == {whole["fresh"]}


def test_an_evaluation_reads_longer_pieces_and_moves_nothing(data: TokenData) -> None:
    loader = StreamLoader(data, 3, 10)
    batches = list(loader.evaluation_batches(20))
    assert sum(weight for _, weight in batches) == 5
    assert all(b["x"].shape == (w, 40) and b["stream"] is None for b, w in batches)
    assert loader.samples == 0
    whole = sum(batch["y"].numel() for batch, _ in loader.evaluation_batches(10**12))
    assert 1000 <= whole < 1000 + 40  # the text once: what evaluation.windows asks for may be more than there is


def test_too_short_a_text_is_refused(data: TokenData) -> None:
    with pytest.raises(ValueError, match="the text is too short: 1,000 tokens are 9 for each of 100 rows"):
        StreamLoader(data, 100, 10)
