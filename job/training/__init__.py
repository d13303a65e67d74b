"""One optimizer step, the trainer around it, optimizers and memory."""
