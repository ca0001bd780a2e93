"""How a decode step is executed: captured CUDA graphs, compiled layers, and the static caches both need."""
