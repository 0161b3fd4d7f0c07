"""The processes of a job: how they wait for each other, agree, and fail together."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax
from jax._src import distributed  # for its key-value store, which has no public name

from vit_nabirds.config import flat
from vit_nabirds.errors import UserError

NODE = os.environ.get("SLURMD_NODENAME", socket.gethostname())
FAILURE = "vit_nabirds/failure"  # key in the coordinator's store: which process failed first
PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "dm-pix", "orbax-checkpoint", "numpy")  # that move results
LONG = 24 * 3600 * 1000  # milliseconds; a peer that fails meanwhile ends the wait


def process_id() -> int:
    """This process's number, also before JAX has touched a device."""
    return distributed.global_state.process_id


def is_writer() -> bool:
    """Whether this process is the one that writes logs, events and configuration."""
    return process_id() == 0


def is_alone() -> bool:
    return distributed.global_state.client is None


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


def fail(message: str, code: int) -> NoReturn:
    """Show the message and end all processes of the job; of several that fail, the first one's is shown."""
    state, is_first = distributed.global_state, True
    message = f"process {state.process_id} of {state.num_processes} on {NODE}: {message}"
    try:
        state.client.key_value_set(FAILURE, message)
    except jax.errors.JaxRuntimeError as error:
        is_first = "ALREADY_EXISTS" not in str(error)
    if is_first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if is_writer():
        time.sleep(2)  # the others hear of it from this process
    os._exit(code)  # what JAX does at exit would wait for the others


def end_with_the_first(ended: threading.Event) -> None:
    """Look for the news that a process has failed, and end: it has said why."""
    while not ended.wait(0.5):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no such news
            distributed.global_state.client.key_value_try_get(FAILURE)
            if is_writer():
                time.sleep(1)  # the others hear of it from this process
            os._exit(1)


def end_unless_told(_type, error: BaseException | None, _traceback) -> None:
    """An exit callback: after an error that nobody foresaw, do not wait for the other processes in clean-up."""
    if error is not None and not is_alone() and not isinstance(error, UserError | OSError):
        fail_unexpectedly(error)


def fail_unexpectedly(error: BaseException) -> NoReturn:
    """End after an error that may be the consequence of another process's, whose message then is the one to show."""
    time.sleep(3)  # `end_with_the_first` ends this process if another has failed
    if re.search(r"gloo|nccl|coordination|heartbeat|closed by peer", str(error), re.IGNORECASE):
        fail(
            f"another process was lost without a word, killed or out of memory ({_first_line(error)}): see what srun "
            "says of it, or `sacct -j JOB`. The same command goes on from the last checkpoint.",
            1,
        )
    fail("".join(traceback.format_exception(error)), 1)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
