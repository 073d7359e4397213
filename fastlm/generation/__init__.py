"""Generation: `generate`, the caches it uses, and the sampling functions."""

from fastlm.generation.beam import Hypothesis, beam_search
from fastlm.generation.cache import KVCache, PrefixCache, RaggedCache
from fastlm.generation.generate import generate
from fastlm.generation.recurrent import generate_recurrent
from fastlm.generation.sampling import Sampling, filter_min_p, filter_top_k, filter_top_p, penalise_repetition
from fastlm.generation.stopping import stop_rule

__all__ = [
    "Hypothesis",
    "KVCache",
    "PrefixCache",
    "RaggedCache",
    "Sampling",
    "beam_search",
    "filter_min_p",
    "filter_top_k",
    "filter_top_p",
    "generate",
    "generate_recurrent",
    "penalise_repetition",
    "stop_rule",
]
