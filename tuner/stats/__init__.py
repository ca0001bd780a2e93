"""The statistics of verdicts and comparisons: pure functions on numpy and scipy, every formula with its source."""
