"""Composition: builds the parts of each mode from its settings, once."""
