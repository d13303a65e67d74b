"""The HTML report and the model card: `report` and `model_card` gather what `templates/` show; charts and sentences."""
