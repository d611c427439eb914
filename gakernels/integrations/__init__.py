"""In other libraries: their models on our operations, and ours under their trainers and evaluations."""
