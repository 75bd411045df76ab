"""Prompt pairs, what an HGR learns from: built-in ones, the user's own, files, and the held-out split. No torch, no ComfyUI."""

from .build import Built, Clean, Material, Sourced, build, clean_words_to_avoid, keep_categories
from .own import category_name, parse_own, read_file
from .seven import CATEGORIES, CONCEPTS, seven_categories
from .types import PromptPair, PromptSet

__all__ = [
    "CATEGORIES", "CONCEPTS", "Built", "Clean", "Material", "PromptPair", "PromptSet", "Sourced", "build", "category_name",
    "clean_words_to_avoid", "keep_categories", "parse_own", "read_file", "seven_categories",
]  # fmt: skip
