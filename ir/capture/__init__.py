"""Capture: torch.fx graphs of ATen ops become our graphs."""
