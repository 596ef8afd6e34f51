"""Search: device models and the cost model."""
