"""What JAX has no public name for, in one place."""

from jax._src import distributed


def coordination_client():
    """The client of JAX's coordination service: a key-value store and barriers that all processes of the job share."""
    return distributed.global_state.client
