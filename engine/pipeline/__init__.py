"""Runs: config, plugins, stages, checkpoints, resume."""
