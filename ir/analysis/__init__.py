"""Analyses over graphs: structural hash, blocks."""
