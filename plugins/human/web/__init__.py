"""The pages of the rating service."""
