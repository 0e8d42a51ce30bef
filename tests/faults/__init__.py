"""Whole programs on networks that fail: what must not break, and what comes back by itself."""
