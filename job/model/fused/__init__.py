"""Fused LoRA layers: forward and backward passes in fewer kernels and with less memory."""
