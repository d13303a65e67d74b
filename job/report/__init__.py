"""The HTML report and the model card: `report` and `model_card` gather the values that `templates/` lay out."""
