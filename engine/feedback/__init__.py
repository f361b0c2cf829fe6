"""Ask feedback sources and collect their answers."""
