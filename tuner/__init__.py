"""Decides what to measure and what it means; knows nothing of torch."""

if __name__ != "pipetune.tuner":
    raise ImportError("tuner is pipetune.tuner: import that; the command line is `python -m pipetune`")
