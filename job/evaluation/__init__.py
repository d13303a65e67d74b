"""Tasks of lm-eval, scoring, one record per question, paired statistics."""
