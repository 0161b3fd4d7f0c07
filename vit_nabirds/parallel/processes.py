"""The processes of a job: how they wait for each other, and agree."""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from jax._src import distributed  # for its key-value store, which has no public name

from vit_nabirds.config.fields import flat
from vit_nabirds.errors import UserError
from vit_nabirds.parallel.link import is_alone, process_id

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "dm-pix", "orbax-checkpoint", "numpy")  # that move results
LONG = 24 * 3600 * 1000  # milliseconds; a peer that fails meanwhile ends the wait


def is_writer() -> bool:
    """Whether this process is the one that writes logs, events and configuration."""
    return process_id() == 0


def wait_for_all(name: str) -> None:
    """Go on when all processes have come to the point of this name."""
    if not is_alone():
        distributed.global_state.client.wait_at_barrier(f"vit_nabirds/{name}", LONG)


@contextlib.contextmanager
def writer_first(name: str) -> Iterator[None]:
    """The other processes enter when the writer has left: it makes or fetches what all then read."""
    if not is_writer():
        wait_for_all(name)
    yield
    if is_writer():
        wait_for_all(name)


def check_same_program(config: dict) -> None:
    """Raise UserError in a process that runs other code, other packages or another configuration than process 0."""
    if is_alone():
        return
    code = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    environment = packages | {"python": platform.python_version(), "vit_nabirds": code.hexdigest()[:12]}
    check_agreement("the environment", environment, "Use one environment and one checkout on storage that all share.")
    # The data may lie elsewhere on each node; their fingerprints are compared.
    fields = {f"config.{field}": value for field, value in flat(config).items() if field != "data.root"}
    check_agreement("the configuration", fields, "Start all processes with the same command.")


def check_agreement(name: str, mine: dict, remedy: str) -> None:
    """Raise UserError in a process whose values differ from those of process 0; no process goes on before all agree."""
    if is_alone():
        return
    client, key = distributed.global_state.client, f"vit_nabirds/{name}"
    mine = json.loads(json.dumps(mine))
    if is_writer():
        client.key_value_set(key, json.dumps(mine))
    else:
        first = json.loads(client.blocking_key_value_get(key, LONG))
        differing = [field for field in sorted(first | mine) if first.get(field) != mine.get(field)]
        if differing:
            what = "; ".join(f"{x} is {mine.get(x)!r} here and {first.get(x)!r} there" for x in differing[:5])
            raise UserError(f"{name} differs from that of process 0: {what}. {remedy}")
    wait_for_all(f"{name} agreed")


def check_shared(file: Path) -> None:
    """Raise UserError in a process that cannot see what the writer has written."""
    wait_for_all(f"{file} written")
    for _ in range(100):  # network file systems take a moment
        if file.exists():
            return
        time.sleep(0.1)
    raise UserError(f"{file.parent} is not the same folder on all nodes: give a --workdir on storage that they share.")
