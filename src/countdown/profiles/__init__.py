"""Profiles: what calibration made, and what is asked of it: recipes, artifacts, what is stored beside a model."""
