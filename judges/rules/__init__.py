"""Judges without a model."""
