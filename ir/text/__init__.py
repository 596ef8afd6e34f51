"""The text form: deterministic, readable, parses back."""
