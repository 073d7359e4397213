"""A configuration: the block sizes (constants of the kernel), and how many warps and stages it is compiled with."""

from __future__ import annotations

from typing import Any


class Config:
    """`Config(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)`; `config["BLOCK_M"]` gives a constant back.

    Compared by identity, which makes it a cheap key; `same` compares what it says.
    """

    __slots__ = ("constants", "maxnreg", "num_stages", "num_warps")

    def __init__(self, *, num_warps: int = 4, num_stages: int = 2, maxnreg: int | None = None, **constants: Any):
        self.constants = constants
        self.num_warps = num_warps
        self.num_stages = num_stages
        self.maxnreg = maxnreg

    def __getitem__(self, name: str) -> Any:
        return self.constants[name]

    def __repr__(self) -> str:
        values = {**self.constants, "warps": self.num_warps, "stages": self.num_stages}
        if self.maxnreg is not None:
            values["registers"] = self.maxnreg
        return ", ".join(f"{k} {v}" for k, v in values.items())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.constants, **self.options()}

    def options(self) -> dict[str, Any]:
        """Of Triton's compiler. Multiplications and additions are fused; Triton 3.10 leaves them alone by default."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        return options

    def same(self, other: dict[str, Any]) -> bool:
        return self.as_dict() == other
