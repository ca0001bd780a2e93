"""What only a machine with a GPU can show: `python -m bench.gpu_check`, in sections that cannot spoil one another."""
