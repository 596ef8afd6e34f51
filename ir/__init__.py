"""Level 1: the graph IR - types, ops, graphs, text form, interpreter, verifier, rewriting, analyses, capture."""
