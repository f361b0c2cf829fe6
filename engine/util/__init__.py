"""Helpers without knowledge of the domain: ids, files, secrets, near names, coroutines, memory."""

from . import files as files
