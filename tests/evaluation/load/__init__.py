"""Plans under arrivals beside transformers' continuous batching, and the other numbers that are promised for load."""
