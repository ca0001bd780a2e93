"""The runtime: one stage of a pipeline, its loop over tasks, its kernels and its links."""
