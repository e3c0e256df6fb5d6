"""What a model is worth: measures, and the report page."""
