"""The durable state of training: written, committed, verified, restored."""
