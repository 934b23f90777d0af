"""Measure results: image metrics, and comparisons on scenes with known novel views."""
