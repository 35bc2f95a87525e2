"""Directions that several models share, from the inner products of the models alone."""
