"""The best compression within a budget: the recipe is written, run and measured."""
