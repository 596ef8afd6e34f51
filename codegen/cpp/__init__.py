"""The C++ printer and its vector header."""
