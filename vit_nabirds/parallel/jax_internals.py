"""What JAX has no public name for, in one place."""

from jax._src import distributed
from jax._src.cudnn import fused_attention_stablehlo


def coordination_client():
    """The client of JAX's coordination service: a key-value store and barriers that all processes of the job share."""
    return distributed.global_state.client


def assume_cudnn() -> None:
    """Let programs with cuDNN's attention be compiled where the library is not installed."""
    fused_attention_stablehlo.check_cudnn_version = lambda: 90800
