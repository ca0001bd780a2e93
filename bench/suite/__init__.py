"""Plans under pytest-benchmark: `pytest pipetune/bench/suite --plan best_plan.json --benchmark-json out.json`.

From any other folder it is `python -m pipetune.bench.suite --plan …`. Every round is a fleet of fresh processes,
measured as `pipetune bench` measures it, and what pytest-benchmark takes for a round's time is the workload's own
duration: its tables, `pytest-benchmark compare` and whatever else reads its JSON work as they are. `extra_info`
carries what each round gave by our metrics, and the machine; `pipetune gate OLD.json NEW.json` reads that.
"""
