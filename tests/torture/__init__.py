"""Faults made up from a seed, without end: each module has `once(seed, folder)`, which raises for what must not be."""
