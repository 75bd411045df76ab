"""Prompt pairs, what an HGR learns from: built-in ones, the user's own, files, and the held-out split. No torch, no ComfyUI."""

from .build import Built, Clean, Material, Sourced, build, clean_words_to_avoid, keep_categories
from .lists import SUFFIXES, distinct, read_prompts, without_words
from .own import category_name, parse_own, read_file
from .seven import (
    CALIBRATION_PROMPTS,
    CATEGORIES,
    CLEAN_PROMPTS,
    CONCEPTS,
    NEUTRAL,
    PAIRS_PER_CATEGORY,
    default_prompts,
    seven_categories,
)
from .types import PromptPair, PromptSet

__all__ = [
    "CALIBRATION_PROMPTS", "CATEGORIES", "CLEAN_PROMPTS", "CONCEPTS", "NEUTRAL", "PAIRS_PER_CATEGORY", "SUFFIXES", "Built", "Clean",
    "Material", "PromptPair", "PromptSet", "Sourced", "build", "category_name", "clean_words_to_avoid", "default_prompts", "distinct",
    "keep_categories", "parse_own", "read_file", "read_prompts", "seven_categories", "without_words",
]  # fmt: skip
