"""Pure formulas over columns of layouts: parameters, FLOPs, memory, step time, cost. No spec, no "best", no files."""
