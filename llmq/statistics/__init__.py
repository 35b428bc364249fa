"""Figures, their intervals, and the comparison of two of them. Pure: numbers in, numbers out."""
