"""What everything here needs of ComfyUI: model families, schemas, encoding, hooks."""
