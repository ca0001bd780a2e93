"""Our search over vLLM's plans beside others, on a landscape measured whole, and the engine beside itself and ours."""
