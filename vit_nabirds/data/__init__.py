"""Photographs on disk: archives, prepared folders, packs, and each host's batches. Nothing here uses JAX."""
