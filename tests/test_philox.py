"""Philox4x32-10 against the known answers that its authors publish (Random123, kat_vectors), and the dropout masks."""

from __future__ import annotations

import pytest
import torch

from fastlm.ops import philox

KNOWN_ANSWERS = [  # counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    assert tuple(int(w) for w in philox.philox4x32(counter, key)) == words


def test_counters_broadcast() -> None:
    counters = [torch.tensor(column) for column in zip(*(c for c, _, _ in KNOWN_ANSWERS), strict=True)]
    keys = [torch.tensor(column) for column in zip(*(k for _, k, _ in KNOWN_ANSWERS), strict=True)]
    words = torch.stack(philox.philox4x32(counters, keys), -1)
    assert words.tolist() == [list(w) for _, _, w in KNOWN_ANSWERS]


def test_mask_element_by_element() -> None:
    """Element (i, j) of a plane is word j % 4 of the counter (i, j // 4, plane, offset), under the seed as the key."""
    seed, offset = 0x0123456789ABCDEF, 0x7_0000_0009
    state = torch.tensor([seed, offset])
    mask = philox.keep_mask(state, 0.3, torch.tensor([[0, 5]]), range(2, 4), range(3, 10))
    assert mask.shape == (1, 2, 2, 7)
    for p, plane in enumerate((0, 5)):
        for i in range(2, 4):
            for j in range(3, 10):
                words = philox.philox4x32((i, j // 4, plane, 9), (0x89ABCDEF, 0x01234567))
                assert bool(mask[0, p, i - 2, j - 3]) == (int(words[j % 4]) >= round(0.3 * 2**32))


def test_a_part_of_a_mask_is_the_mask_of_the_part() -> None:
    state, planes = philox.draw_state(torch.device("cpu")), torch.arange(3)
    whole = philox.keep_mask(state, 0.5, planes, range(20), range(33))
    part = philox.keep_mask(state, 0.5, planes[1:], range(7, 19), range(6, 31))
    assert torch.equal(part, whole[1:, 7:19, 6:31])


def test_share_and_independence_of_what_is_kept() -> None:
    torch.manual_seed(0)
    for p in (0.1, 0.5, 0.9):
        mask = philox.keep_mask(philox.draw_state(torch.device("cpu")), p, torch.arange(4), range(256), range(256))
        n = mask.numel()
        assert abs(mask.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
        centred = mask.double() - (1 - p)
        for shifted in (centred.roll(1, -1), centred.roll(1, -2), centred.roll(1, 0)):
            assert abs((centred * shifted).mean().item()) < 5 * p * (1 - p) / n**0.5


def test_state_follows_manual_seed() -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    first, second = philox.draw_state(cpu), philox.draw_state(cpu)
    torch.manual_seed(1)
    assert torch.equal(philox.draw_state(cpu), first) and not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (2,)


def test_threshold() -> None:
    assert philox.threshold(0.5) == 2**31
    assert philox.threshold(0.0) == 0
    assert philox.threshold(1 - 2**-40) == 2**32 - 1
