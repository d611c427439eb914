"""What a generator is worth, against the alternatives."""
