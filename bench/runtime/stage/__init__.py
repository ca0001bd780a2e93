"""One stage: the layers it keeps, what stands in for the others, its KV cache and its weights' formats."""
