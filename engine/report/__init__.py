"""Pictures and transcripts of runs."""
