"""The names that users type: short functions that return a `Monitor`."""
