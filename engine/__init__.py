"""The engine. It knows no particular environment, judge, credit method or optimizer: those are
plugins."""
