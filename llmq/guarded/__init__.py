"""Readers of untrusted files: bytes, depth and counts are bounded; every fault is one line with file and place."""
