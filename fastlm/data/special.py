"""The tokens around and in the place of text: where a sequence begins and ends, and the mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastlm.data.bpe import BPETokenizer
from fastlm.data.tokenizers import Tokenizer

_BEGIN = ("[CLS]", "<s>", "<|begin_of_text|>", "<bos>")
_END = ("[SEP]", "</s>", "<|end_of_text|>", "<eos>")
_MASK = ("[MASK]", "<mask>")


@dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens, None where a vocabulary has none. Without tokens of their own, the end-of-text token
    stands at the beginning and at the end, as between the documents of a dataset."""

    begin: int | None
    end: int | None
    mask: int | None

    def frame(self, ids: Sequence[int], longest: int) -> list[int]:
        """begin + ids + end, the ids cut on the right where there would be more than `longest`."""
        begin = [] if self.begin is None else [self.begin]
        end = [] if self.end is None else [self.end]
        return begin + list(ids)[: max(0, longest - len(begin) - len(end))] + end

    def all(self) -> list[int]:
        """The ids that are there."""
        return sorted({i for i in (self.begin, self.end, self.mask) if i is not None})


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The special tokens of a vocabulary, found by the names that published ones give them."""

    def find(names: tuple[str, ...]) -> int | None:
        if not isinstance(tokenizer, BPETokenizer):
            return None
        return next((i for i in map(tokenizer.backend.token_to_id, names) if i is not None), None)

    begin, end = find(_BEGIN), find(_END)
    return SpecialIds(tokenizer.eot if begin is None else begin, tokenizer.eot if end is None else end, find(_MASK))
