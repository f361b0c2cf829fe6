"""The ledger: episodes, requests, feedback, training records."""
