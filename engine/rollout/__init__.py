"""Play conversations."""
