"""Training-free guidance by concept prompts."""
