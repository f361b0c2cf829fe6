"""Command-line commands about judges."""
