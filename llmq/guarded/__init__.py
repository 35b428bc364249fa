"""Readers of what others wrote: bytes, depth and counts are bounded, every fault is one line with file and place."""
