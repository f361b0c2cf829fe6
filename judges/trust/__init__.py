"""Whether a judge may be trusted."""
