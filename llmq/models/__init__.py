"""Families of models, each with its way of opening weights."""
