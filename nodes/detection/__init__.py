"""Detectors of harm in prompts and pictures, and what acts on them."""
