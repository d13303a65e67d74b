"""Evaluation: lm-eval (`tasks`, `harness`), the model's scores (`scorer`, `scoring`), `samples`, `statistics`."""
