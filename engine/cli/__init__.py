"""The command line; `main.py` starts it, each of the other files holds commands."""
