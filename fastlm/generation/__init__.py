"""Generation: `generate`, the caches it uses, and `Sampling`."""

from fastlm.generation.beam import Hypothesis, beam_search
from fastlm.generation.cache import KVCache, PrefixCache, RaggedCache
from fastlm.generation.generate import generate
from fastlm.generation.recurrent import generate_recurrent
from fastlm.generation.sampling import Sampling, penalise_repetition
from fastlm.generation.stopping import stop_rule

__all__ = [
    "Hypothesis",
    "KVCache",
    "PrefixCache",
    "RaggedCache",
    "Sampling",
    "beam_search",
    "generate",
    "generate_recurrent",
    "penalise_repetition",
    "stop_rule",
]
