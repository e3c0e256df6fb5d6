"""Measures of a model's quality, and the report page."""
