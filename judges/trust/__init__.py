"""Checks of whether a judge can be trusted."""
