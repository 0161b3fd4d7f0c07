"""JAX's compilation cache in a run's workdir, for its next start."""

import logging
import tempfile
from pathlib import Path

import jax

log = logging.getLogger("vit_nabirds")


def keep_compiled(folder: Path, is_writer: bool) -> None:
    """Keep compiled programs in `folder`, unless JAX_COMPILATION_CACHE_DIR names another; process 0 writes to it."""
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        folder.mkdir(exist_ok=True)
        if is_writer:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        log.info("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # else the folder's path is in each key
