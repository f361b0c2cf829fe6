"""The APIs by which programs ask a model."""
