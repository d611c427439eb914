"""The evaluations: what is read, asked and scored in each."""
