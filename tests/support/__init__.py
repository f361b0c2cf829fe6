"""Holds what several tests share: clocks, conversations, models, judges, raters and servers."""
