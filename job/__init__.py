"""qlora-job: QLoRA fine-tuning as one batch job that can be killed at any second and believed when it is done."""

__version__ = "0.1.0"
