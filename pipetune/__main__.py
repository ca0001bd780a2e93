"""`python -m pipetune`: the same as the command `pipetune`."""

from pipetune.tuner.cli import main

main()
