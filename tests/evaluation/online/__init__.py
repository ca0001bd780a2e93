"""What requests over time cost beside batches: an order to the other stages, and the same work as an offline pass."""
