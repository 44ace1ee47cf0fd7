"""Studies over training-set sizes and seeds: subsets, runs, statistics, report."""
