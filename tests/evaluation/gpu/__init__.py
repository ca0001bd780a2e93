"""What only a GPU can show: `python -m tests.evaluation.gpu`, in sections that cannot spoil one another."""
