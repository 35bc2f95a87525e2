"""Subspaces that several models share: fitted, extended, and used to keep, rebuild and merge models."""
