"""The stages of a pipeline: one readable file each."""
