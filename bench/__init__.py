"""Measures one plan on real devices; knows nothing of search."""

if __name__ != "pipetune.bench":
    raise ImportError("bench is pipetune.bench: import that, or run `python -m pipetune.bench...`")
