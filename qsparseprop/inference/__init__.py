"""Frozen models for serving: what was trained, swapped or dense, as codes from one layer to the next."""
