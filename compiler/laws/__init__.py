"""Scaling laws and laws of hyperparameters: pure formulas over numpy columns. They know facts, not spec or plan."""
