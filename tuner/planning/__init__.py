"""The cost model: what tasks cost, the simulated schedule, its calibration by runs, and partitions of layers."""
