"""GPUs that need not be there: a mesh of described ones, for which XLA compiles on any machine."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from vit_nabirds.errors import ConfigError, UserError
from vit_nabirds.parallel import devices, jax_internals

GIB = 2**30
PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What NVIDIA's data sheets say of a GPU, and what XLA asks about it. Rates are per second and in one direction."""

    name: str
    memory: int  # bytes
    bandwidth: float  # bytes of memory
    flops: dict[str, float]  # dense products, by the dtype of the activations; float32 is rounded to TF32
    link: float  # bytes to the other GPUs of a node
    network: float  # bytes to other nodes: the fastest adapter that is common, one for each GPU
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # float32 units of each
    threads: int  # resident on each
    shared_memory: tuple[int, int]  # bytes of each; the most for a block
    cache: int  # bytes
    clock: float  # GHz

    def for_xla(self) -> str:
        """A GpuTargetConfigProto as text."""
        major, minor = self.capability
        feature = " feature_extension: ACCELERATED_FEATURES" if major == 9 else ""
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory[0]}
  shared_memory_per_block_optin: {self.shared_memory[1]} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {self.cores} fpus_per_core: {self.units} clock_rate_ghz: {self.clock} l2_cache_size: {self.cache}
  memory_bandwidth: {self.bandwidth:.0f} device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor}{feature} }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "NVIDIA {self.name}" """


def _ampere(name: str, memory: float, bandwidth: float) -> Gpu:
    flops = {"bfloat16": 312e12, "float32": 156e12}
    cores = dict(cores=108, units=64, threads=2048, shared_memory=(167936, 166912), cache=40 * 2**20, clock=1.41)
    return Gpu(name, int(memory * GIB), bandwidth, flops, link=300e9, network=25e9, capability=(8, 0), **cores)


def _hopper(name: str, memory: float, bandwidth: float) -> Gpu:
    flops = {"bfloat16": 989e12, "float32": 495e12}
    cores = dict(cores=132, units=128, threads=2048, shared_memory=(233472, 232448), cache=50 * 2**20, clock=1.98)
    return Gpu(name, int(memory * GIB), bandwidth, flops, link=450e9, network=50e9, capability=(9, 0), **cores)


GPUS = {
    "a100-40": _ampere("A100-SXM4-40GB", 39.4, 1.555e12),
    "a100-80": _ampere("A100-SXM4-80GB", 79.1, 2.039e12),
    "h100": _hopper("H100 80GB HBM3", 79.1, 3.35e12),
    "h200": _hopper("H200", 139.8, 4.8e12),
    "l40s": Gpu(
        "L40S", int(44.4 * GIB), 864e9, {"bfloat16": 362e12, "float32": 183e12}, link=32e9, network=25e9,
        capability=(8, 9), cores=142, units=128, threads=1536, shared_memory=(102400, 101376), cache=96 * 2**20,
        clock=2.52,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Machines:
    """So many nodes with so many GPUs each."""

    nodes: int
    per_node: int
    gpu: Gpu

    @property
    def size(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        return f"{self.size} {self.gpu.name} on {self.nodes} node{'s' if self.nodes > 1 else ''}"


def parse(text: str) -> Machines:
    """'h100', '4 h100' or '2x4 h100', which is two nodes with four each; ConfigError for anything else."""
    found = re.fullmatch(r"\s*(?:(?:(\d+)\s*x\s*)?(\d+)\s+)?([\w-]+)\s*", text.lower())
    nodes, per_node = (int(number or 1) for number in found.group(1, 2)) if found else (0, 0)
    if not nodes * per_node or found[3] not in GPUS:
        names = ", ".join(sorted(GPUS))
        raise ConfigError(f"--gpus is {text!r}: it must be like '2x4 h100' (nodes x GPUs of each); known are {names}.")
    if nodes * per_node > 4096:
        raise ConfigError(f"--gpus is {text!r}: up to 4096 GPUs can be described.")
    return Machines(nodes, per_node, GPUS[found[3]])


def peak_of(device_kind: str, dtype: str) -> float | None:
    """FLOP/s of dense products of a GPU as JAX names it; None if it is not among these."""
    names = {name.partition("-")[0].upper(): gpu for name, gpu in GPUS.items()}
    return next((gpu.flops[dtype] for name, gpu in names.items() if name in device_kind), None)


def can_compile() -> bool:
    """Whether JAX's CUDA plug-in is installed, among the packages or by `make gpu-compile`."""
    folder = Path(sys.prefix) / "gpu-compile"
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    return any(importlib.util.find_spec("jax_plugins") and importlib.util.find_spec(name) for name in PLUGINS)


def stay_off_devices(cpu_devices: int) -> None:
    """Let JAX see CPUs alone, so many of them, whatever this machine has. Call it before JAX is used."""
    jax.config.update("jax_platforms", "cpu")
    devices.split_cpu(cpu_devices)
    with _quiet():
        jax.devices()


def mesh_of(machines: Machines, fsdp: int = 1) -> Mesh:
    """Described devices as `data` x `fsdp`: XLA compiles for them, and nothing can run on them."""
    jax_internals.assume_cudnn()
    shape = f"1x{machines.nodes}x{machines.per_node}"
    try:
        with _quiet():
            found = topologies.get_topology_desc(platform="cuda", topology=shape, target_config=machines.gpu.for_xla())
    except NotImplementedError as error:  # as JAX says when the plug-in could not be loaded
        raise UserError(
            f"JAX's CUDA plug-in is there, but does not start ({error}): look for a wrong XLA_… variable in the "
            "environment, and for a plug-in of another version than JAX."
        ) from None
    return devices.make_mesh(fsdp, found.devices)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what XLA's libraries say to stderr on a machine that has no GPU."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# XLA chooses between Triton's and cuBLAS's products by trying both on the GPU.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
