"""The embedded demo: an invented world, a tiny base model that read about it, and questions on it."""
