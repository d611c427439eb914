"""Other libraries: their models with our operations, and our models in their trainers and evaluations."""
