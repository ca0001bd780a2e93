"""`python -m tuner`: the same as `pipetune`."""

from tuner.cli import main

main()
