"""JAX's compilation cache in a run's workdir, for the next turn of its job."""

import logging
import tempfile
from pathlib import Path

import jax
from jax._src import compilation_cache  # for the form of its files

log = logging.getLogger("vit_nabirds")


def keep_compiled(folder: Path, is_writer: bool) -> None:
    """Keep what is compiled in `folder`, unless JAX_COMPILATION_CACHE_DIR names another; process 0 writes to it.

    A file that a crash has cut short would be left by JAX as it is, to be compiled anew at every start: it is deleted.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        folder.mkdir(exist_ok=True)
        if is_writer:
            tempfile.TemporaryFile(dir=folder).close()
            for file in folder.glob("*-cache"):
                if not _is_whole(file):
                    file.unlink()
                    log.info("%s was damaged: it is compiled anew", file)
    except OSError as error:
        log.info("what is compiled is not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # else the folder's path is in each key


def _is_whole(file: Path) -> bool:
    try:
        compilation_cache.decompress_executable(file.read_bytes())
    except Exception:  # noqa: BLE001, for each of the compressions has its own errors
        return False
    return True
