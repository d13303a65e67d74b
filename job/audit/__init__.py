"""What the data held: overlap with the scored questions, duplicates, secrets and personal data, by place and kind."""
