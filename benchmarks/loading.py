"""Host memory while training loads a checkpoint of ViT-L's size:  python -m benchmarks.loading [DTYPE]

Prints the growth of resident memory at its peak, less the parameters, in units of the file's size.
"""

import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from vit_nabirds.models.model import describe
from vit_nabirds.models.pretrained.checkpoint import open_checkpoint
from vit_nabirds.models.pretrained.hf_config import DEFAULTS, architecture_of
from vit_nabirds.models.pretrained.names import mapping
from vit_nabirds.parallel import devices

VIT_L = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


def write_checkpoint(folder: Path, dtype: str) -> None:
    architecture = architecture_of(DEFAULTS["vit"] | VIT_L | {"model_type": "vit"})
    rows = [row for row in mapping(architecture, 0) if "classifier" not in row.name]
    draw = np.random.default_rng(0)
    tensors = {f"vit.{row.name}": draw.standard_normal(row.shape, np.float32).astype(dtype) for row in rows}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(VIT_L | {"model_type": "vit"}))
    (folder / "preprocessor_config.json").write_text("{}")


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    dtype = sys.argv[1] if sys.argv[1:] else "float32"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        writer = f"from benchmarks.loading import *; write_checkpoint(Path({str(folder)!r}), {dtype!r})"
        subprocess.run([sys.executable, "-c", writer], check=True)
        size = (folder / "model.safetensors").stat().st_size
        mesh = devices.make_mesh()
        checkpoint = open_checkpoint(str(folder))
        architecture = checkpoint.architecture
        before, peak, done = resident(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.monotonic()
        loaded = checkpoint.load(architecture, [], lambda array: devices.replicate(array, mesh))
        del checkpoint
        model = describe(architecture, 404)
        new = [path for path in model.shapes if path not in loaded]
        params = jax.block_until_ready(loaded | model.initial_params(0, new))
        seconds = time.monotonic() - start
        done.set()
        watcher.join()
        final = sum(array.nbytes for array in params.values())
        print(
            f"ViT-L, {dtype}: file {size / 1e9:.2f} GB, parameters {final / 1e9:.2f} GB, peak "
            f"{(peak - before) / 1e9:.2f} GB: {(peak - before - final) / size:.2f} x the file beyond the parameters, "
            f"in {seconds:.1f} s"
        )


if __name__ == "__main__":
    main()
