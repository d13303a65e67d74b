"""Checkpoints: what they hold, how they are committed, verified and restored."""
