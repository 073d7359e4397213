"""Files and folders that a crash cannot damage: each is there in full, or the one before it is."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Have a file, or the list of a folder's entries, on the disk before going on."""
    if os.name == "nt" and path.is_dir():  # Windows has no handle for a folder's entries
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a small file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


@contextmanager
def replace_folder(folder: Path, keep: Callable[[str], bool]) -> Iterator[Path]:
    """A temporary folder beside `folder` to write to, which takes its place when the block ends without an error.

    The files in it are the caller's to `sync`.

    Args:
        folder: its parents are made.
        keep: which entries of the folder that was there before move over, by name, unless there is a new one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    replaces = folder.exists()
    try:
        yield new
        new.chmod(0o777 & ~_umask())  # mkdtemp made it readable for its owner only
        sync(new)
        if replaces:
            exchange(new, folder)
        else:
            new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync(folder.parent)
    if replaces:  # `new` is now the name of the folder that was there before
        for entry in list(new.iterdir()):
            if keep(entry.name) and not (folder / entry.name).exists():
                entry.rename(folder / entry.name)
        shutil.rmtree(new)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def exchange(new: Path, old: Path) -> None:
    """Swap two folders' names: in one step where the system can (Linux), else in two renames."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        renameat2 = None
    at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's <fcntl.h> and <linux/fs.h>
    if renameat2 is not None and renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
        return
    aside = new.with_suffix(".old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)
