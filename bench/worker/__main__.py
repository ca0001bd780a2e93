"""`python -m pipetune.bench.worker`: one worker process of a fleet."""

from pipetune.bench.worker.main import main

main()
