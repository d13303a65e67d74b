"""QLoRA fine-tuning as one batch job that survives kills, resumes exactly, and publishes verifiable results."""

__version__ = "0.1.0"
