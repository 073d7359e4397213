"""Token shards: a header of 256 bytes, then the ids, read through a memory map.

    offset  bytes  field
    0       8      magic "FASTLMTK"
    8       4      format version (1)
    12      4      bytes per id (2: uint16, 4: uint32)
    16      8      number of ids
    24      8      number of documents that end in this shard (the end-of-text id follows each)
    32      8      bytes of UTF-8 text that the ids stand for (for bits per byte)
    40      4      vocabulary size
    44      4      end-of-text id
    48      32     SHA-256 fingerprint of the tokenizer
    80      176    zero
All integers are little-endian.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastlm.data.tokenizers import Tokenizer
from fastlm.files import sync

MAGIC = b"FASTLMTK"
VERSION = 1
HEADER_BYTES = 256
_HEADER = struct.Struct("<8sIIQQQII32s")


@dataclass(frozen=True)
class ShardHeader:
    """What the header of a shard says."""

    dtype: np.dtype
    tokens: int
    documents: int
    text_bytes: int
    vocab_size: int
    eot: int
    fingerprint: str

    def pack(self) -> bytes:
        fields = (
            MAGIC,
            VERSION,
            self.dtype.itemsize,
            self.tokens,
            self.documents,
            self.text_bytes,
            self.vocab_size,
            self.eot,
        )
        return _HEADER.pack(*fields, bytes.fromhex(self.fingerprint)).ljust(HEADER_BYTES, b"\0")


def read_header(path: str | Path) -> ShardHeader:
    """Read and check the header of a shard, and that the file is as long as the header says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a shard, of an unknown version, or truncated.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as f:
        raw = f.read(HEADER_BYTES)
    if raw[:8] != MAGIC:
        raise ValueError(f"{path} is not a fastlm token shard: it begins with {raw[:8]!r}, wanted {MAGIC!r}")
    if len(raw) < HEADER_BYTES:
        raise ValueError(f"{path} is truncated: {size} bytes, the header alone has {HEADER_BYTES}")
    _, version, itemsize, tokens, documents, text_bytes, vocab_size, eot, digest = _HEADER.unpack_from(raw)
    if version != VERSION:
        raise ValueError(f"{path} is a token shard of version {version}, this fastlm reads version {VERSION}")
    if itemsize not in (2, 4):
        raise ValueError(f"{path} has a damaged header: {itemsize} bytes per id, wanted 2 or 4")
    wanted = HEADER_BYTES + tokens * itemsize
    if size != wanted:
        what = "truncated" if size < wanted else "too long"
        raise ValueError(
            f"{path} is {what}: {size:,} bytes, its header says {tokens:,} ids, which are {wanted:,} bytes"
        )
    return ShardHeader(np.dtype(f"<u{itemsize}"), tokens, documents, text_bytes, vocab_size, eot, digest.hex())


def map_shard(path: str | Path) -> np.ndarray:
    """The ids of a shard as a read-only memory map (numpy array of its dtype)."""
    header = read_header(path)
    if header.tokens == 0:
        return np.empty(0, dtype=header.dtype)  # an empty range cannot be mapped
    return np.memmap(path, dtype=header.dtype, mode="r", offset=HEADER_BYTES, shape=(header.tokens,))


class ShardWriter:
    """Writes one shard piece by piece, and gives it its name only when it is whole and on the disk.

    Use it as a context manager: an exception inside removes the temporary file and leaves an older shard of that name
    as it was.
    """

    def __init__(self, path: str | Path, tokenizer: Tokenizer):
        if tokenizer.eot is None:
            raise ValueError(f"{tokenizer!r} has no end-of-text token, which keeps the documents of a shard apart")
        self.path = Path(path)
        self.tokens = self.documents = self.text_bytes = 0
        self._dtype = tokenizer.dtype.newbyteorder("<")
        self._vocab_size, self._eot, self._fingerprint = tokenizer.vocab_size, tokenizer.eot, tokenizer.fingerprint
        self._end = np.array([tokenizer.eot], dtype=self._dtype).tobytes()
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file: BinaryIO = self._temporary.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def write(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append ids (1-D) of the open document that stand for `text_bytes` bytes of UTF-8."""
        self._file.write(np.ascontiguousarray(ids, dtype=self._dtype).data)
        self.tokens += len(ids)
        self.text_bytes += text_bytes

    def end_document(self) -> None:
        """Append the end-of-text id."""
        self._file.write(self._end)
        self.tokens += 1
        self.documents += 1

    def close(self) -> ShardHeader:
        """Write the header, flush to the disk, rename into place."""
        header = ShardHeader(
            self._dtype, self.tokens, self.documents, self.text_bytes, self._vocab_size, self._eot, self._fingerprint
        )
        self._file.seek(0)
        self._file.write(header.pack())
        self._file.close()
        sync(self._temporary)
        os.replace(self._temporary, self.path)
        return header

    def discard(self) -> None:
        """Give up: remove the temporary file."""
        with contextlib.suppress(OSError):  # it writes what is left, which a full disk refuses once more
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.discard()
        elif not self._file.closed:
            self.close()
