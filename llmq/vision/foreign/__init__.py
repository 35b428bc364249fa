"""Graphs that somebody exported, as models of a stated kind."""
