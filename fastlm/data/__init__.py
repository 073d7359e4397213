"""Text to tokens to batches: tokenizers, token shards, `prepare`, and the loader of training windows."""

from fastlm.data.bpe import BPETokenizer
from fastlm.data.corpus import stdlib_documents
from fastlm.data.documents import Document, find_files, read_documents
from fastlm.data.loader import TokenData, WindowLoader, dataset_tokenizer
from fastlm.data.masking import MaskedLoader, Masker
from fastlm.data.prepare import split_by_document, split_tail, write_dataset
from fastlm.data.ranks import RanksTokenizer
from fastlm.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer, make_tokenizer

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Document",
    "MaskedLoader",
    "Masker",
    "RanksTokenizer",
    "TokenData",
    "Tokenizer",
    "WindowLoader",
    "dataset_tokenizer",
    "find_files",
    "load_tokenizer",
    "make_tokenizer",
    "read_documents",
    "split_by_document",
    "split_tail",
    "stdlib_documents",
    "write_dataset",
]
