"""Hugging Face checkpoints: read, converted, resized, written."""
