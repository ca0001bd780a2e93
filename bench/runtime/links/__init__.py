"""Messages between stages: links, the transports below them, and CUDA streams."""
