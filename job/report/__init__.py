"""What people look at: the HTML report, the model card, charts, and the words for numbers and verdicts."""
