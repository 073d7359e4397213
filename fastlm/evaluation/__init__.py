"""Evaluation: loss, perplexity and bits per byte of a text; multiple-choice tasks."""

from fastlm.evaluation.choice import ChoiceScore, Question, bootstrap_interval, read_questions, score_choices
from fastlm.evaluation.text import TextScore, gzip_bits_per_byte, score_split, score_text, score_tokens

__all__ = [
    "ChoiceScore",
    "Question",
    "TextScore",
    "bootstrap_interval",
    "gzip_bits_per_byte",
    "read_questions",
    "score_choices",
    "score_split",
    "score_text",
    "score_tokens",
]
