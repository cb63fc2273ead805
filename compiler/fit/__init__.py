"""Scaling laws fitted to a user's own runs: a CSV in, constants with intervals, a law file, plots and further runs out."""
