"""A run: everything checked, then the loop."""
