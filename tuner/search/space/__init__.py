"""The search space: layouts of stages, knobs, and plans with their memory caps resolved."""
