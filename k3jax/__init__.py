"""Kandinsky 3 in JAX."""
