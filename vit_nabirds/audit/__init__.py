"""What can be said of a training step before it runs: what was compiled, and how fast it can be."""
