"""What errors say about a name that is not known: the nearest one that is."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """What a message says after an unknown name: " (did you mean 'lr'?)", or nothing where no known one is like it."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return meant(near[0]) if near else ""


def meant(name: str) -> str:
    """The same, where the name that was meant is known."""
    return f" (did you mean {name!r}?)"


def from_fields(cls: type[T], fields: dict[str, Any], name: str | None = None) -> T:
    """A dataclass from its fields; ValueError for one that it does not have, where it is called `name`."""
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for field in fields:
        if field not in known:
            raise ValueError(
                f"{name or cls.__name__} has no field {field!r}{did_you_mean(field, known)}; it has: {', '.join(known)}"
            )
    return cls(**fields)
