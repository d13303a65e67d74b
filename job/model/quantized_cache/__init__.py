"""Quantized base weights, kept so that a restart need not quantize again."""
