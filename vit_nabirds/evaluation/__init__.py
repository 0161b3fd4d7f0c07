"""Photographs scored by a trained model."""
