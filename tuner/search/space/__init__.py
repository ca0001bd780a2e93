"""The search space: layouts of stages, sizes and switches, and plans with their memory caps resolved."""
