"""Every operator in plain torch: its definition, the oracle of the tests, and a backend of its own."""
