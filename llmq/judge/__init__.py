"""Conclusions from figures: comparisons, gates, and proof that a run is real."""
