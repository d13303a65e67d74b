"""The model: base weights, LoRA adapter, packed attention."""
