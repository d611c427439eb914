"""Training of generators: objectives, data, the training loop, checkpoints."""
