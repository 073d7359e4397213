"""When a row is finished: an end-of-text token, token sequences, or the caller's own rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Stop = Callable[[list[int]], bool] | Sequence[int | Sequence[int]]


def eos_tokens(eos_token: int | Sequence[int] | None) -> list[int]:
    """The tokens that end a text, as a list."""
    if eos_token is None:
        return []
    return list(eos_token) if isinstance(eos_token, Sequence) else [int(eos_token)]


def stop_rule(stop: Stop | None, eos_token: int | Sequence[int] | None) -> Callable[[list[int]], bool] | None:
    """A function of a continuation (the new tokens so far) that is True when it is finished; None: nothing stops it.

    Args:
        stop: token sequences (one id stands for a sequence of one) that the continuation must not go past, or a
            function of the continuation.
        eos_token: the token that ends a text, or several of which each does.
    """
    ends = eos_tokens(eos_token)
    if callable(stop):
        own = stop
        return (lambda new: new[-1] in ends or bool(own(new))) if ends else own
    endings = [[s] if isinstance(s, int) else list(s) for s in stop or ()]
    if any(not isinstance(token, int) for ending in endings for token in ending):
        raise ValueError(
            f"stop must hold token ids, got {stop!r}; to stop at a text, pass a function that decodes: "
            'stop=lambda ids: "text" in tokenizer.decode(ids)'
        )
    if any(not ending for ending in endings):
        raise ValueError("stop holds an empty token sequence, which would stop every row at once")
    endings += [[end] for end in ends]
    if not endings:
        return None
    return lambda new: any(new[-len(ending) :] == ending for ending in endings)
