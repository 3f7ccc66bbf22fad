"""Recipes: every setting of a run, with its default."""
