"""The audit of the training data: overlap with the scored questions, duplicates, secrets, personal data."""
