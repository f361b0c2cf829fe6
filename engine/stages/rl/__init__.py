"""The stage `rl`."""
