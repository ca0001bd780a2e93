"""Seconds that tasks and messages take: nominal, profiled, or described in a file."""
