"""Redirecting guidance while a model samples: the Apply node and its hooks."""
