"""Hugging Face checkpoints: reading, converting, resizing, writing."""
