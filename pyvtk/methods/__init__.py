"""Published methods, each composed from the operators in one short file."""
