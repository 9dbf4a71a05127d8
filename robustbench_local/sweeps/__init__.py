"""Sweeps: planned before they start, journalled while they run, told as one at their end."""
