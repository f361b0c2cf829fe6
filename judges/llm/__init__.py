"""Ways of judging by a model."""
