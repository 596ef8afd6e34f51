"""Passes: Graph -> Graph, one file each."""
