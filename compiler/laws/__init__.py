"""Scaling laws: pure formulas over numpy columns. They know facts, and nothing of a spec or a plan."""
