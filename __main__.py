"""`python -m turnwise`."""

from .engine.cli.main import main

main()
