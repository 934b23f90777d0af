"""The base model, the geometry adapter and LoRA on it, and their weights."""
