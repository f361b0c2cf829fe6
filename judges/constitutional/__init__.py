"""Judging and revising by a constitution."""
