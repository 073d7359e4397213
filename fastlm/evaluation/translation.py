"""BLEU and chrF of translations, by the `sacrebleu` library."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence


def check_installed() -> None:
    """ValueError where sacrebleu is not installed."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise ValueError("BLEU and chrF need the package sacrebleu: pip install sacrebleu")


def score_translations(translations: Sequence[str], references: Sequence[str]) -> tuple[float, float]:
    """Corpus BLEU (Papineni et al. 2002) and chrF (Popović 2015), each from 0 to 100, with sacrebleu's defaults.

    Raises:
        ValueError: sacrebleu is not installed, or there are not as many references as translations.
    """
    check_installed()
    if len(translations) != len(references) or not references:
        raise ValueError(f"wanted one reference for each translation, got {len(references)} for {len(translations)}")
    import sacrebleu

    bleu = sacrebleu.corpus_bleu(list(translations), [list(references)])
    chrf = sacrebleu.corpus_chrf(list(translations), [list(references)])
    return float(bleu.score), float(chrf.score)
