"""Fine-tune Vision Transformers on photographs of birds, on every device you have."""
