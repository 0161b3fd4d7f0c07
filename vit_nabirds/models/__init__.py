"""The Vision Transformer, and what each kind of device computes in its own way."""
