"""Models: found, checked, described, and filled with dummy weights; runs inside a worker."""
