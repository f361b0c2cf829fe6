"""Users who are played by a model, and what such users are worth."""
