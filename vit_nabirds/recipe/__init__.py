"""What a training step does to images and parameters: one function for each part of the recipe."""
