"""`python -m turnwise`."""

from .engine.cli import main

main()
