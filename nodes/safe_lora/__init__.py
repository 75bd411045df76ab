"""Safe fine-tuning: a LoRA that is safe with none of our nodes present."""
