"""Templates of what a bundle holds: one program a stage, its launcher and its README. `compiler/emit.py` renders them."""
