"""Judges made of judges."""
