"""tilewright: a graph-IR compiler and auto-optimizer for PyTorch."""
