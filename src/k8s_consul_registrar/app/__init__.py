"""Composition: one module a command; the only place that builds and connects."""
