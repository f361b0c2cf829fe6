"""Plays conversations."""
