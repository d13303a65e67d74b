"""Quantized base weights, cached so that a restart does not quantize again."""
