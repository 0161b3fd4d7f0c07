"""The processes of a job: how they wait for each other, agree, and end together.

JAX's own meeting ends in a stack trace if a process is missing, and takes a minute to notice the loss of one. So each
process holds a TCP connection to process 0 for the whole run; messages on it are JSON lines. A process that ends says
goodbye, or its exit code and a message; a connection that closes without a word means that the process was killed.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NoReturn

from vit_nabirds.errors import ConfigError, TransientError, UserError, exit_code_of, message_of, say
from vit_nabirds.parallel.accelerators import Seen, Share, share
from vit_nabirds.parallel.meeting import LOCAL_ID, NODE, SLURM_JOB, report_to_first, wait_for_others, write

SEE = "" if SLURM_JOB == "none" else f" See what srun says about it, or `sacct -j {SLURM_JOB}`."
LOST = (
    "process {} of {} on {} ended without a word: killed, or out of memory?" + SEE + " The same command goes on from "
    "the last checkpoint."
)
DAY = 24 * 3600 * 1000  # milliseconds; a peer that fails meanwhile ends the wait


class ProcessGroup:
    """The processes of a job. `ProcessGroup()` is a process alone: a group of one, in which every method works."""

    def __init__(self, process_id: int = 0, num_processes: int = 1) -> None:
        self.process_id, self.num_processes = process_id, num_processes
        # Process 0 is connected to all others, by their ids; they are connected to process 0.
        self._peers: dict[int, tuple[socket.socket, str]] = {}
        self._failing, self._writing = threading.Lock(), threading.Lock()
        self._states, self._heard, self._gone = {}, threading.Condition(), set()
        self.state: Callable[[], dict] = dict  # what this process tells the others about itself (`ask`)

    @property
    def is_writer(self) -> bool:
        """Whether this process writes logs, events and configuration."""
        return self.process_id == 0

    def meet(
        self, host: str, port: int, timeout: float, seen: Seen | None = None, share: Share = share
    ) -> list[int] | None:
        """Connect to the others within `timeout` seconds, else UserError. From then on the end of one ends all.

        Process 0 hears which GPUs each sees and shares them out. Returns this one's share.
        """
        seen = seen or Seen(NODE, [])
        if self.is_writer:
            self._peers, own = wait_for_others(host, port, self.num_processes, timeout, seen, share)
        else:
            connection, own = report_to_first(host, port, self.process_id, timeout, seen)
            self._peers = {0: (connection, host)}
        for connection, _ in self._peers.values():
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, seconds in {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}.items():  # power is lost
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        for process_id, peer in self._peers.items():
            threading.Thread(target=self._listen, args=[process_id, *peer], daemon=True).start()
        return own

    def barrier(self, name: str) -> None:
        """Return when all processes have reached the barrier of this name."""
        if self.num_processes > 1:
            _client().wait_at_barrier(f"vit_nabirds/{name}", DAY)

    @contextlib.contextmanager
    def writer_first(self, name: str) -> Iterator[None]:
        """The writer makes or fetches what the others then read: they enter when it has left."""
        if not self.is_writer:
            self.barrier(name)
        yield
        if self.is_writer:
            self.barrier(name)

    def agree(self, name: str, values: dict, remedy: str) -> None:
        """Return when all processes hold the values of process 0; UserError in one that holds others."""
        if self.num_processes == 1:
            return
        key, values = f"vit_nabirds/{name}", json.loads(json.dumps(values))
        if self.is_writer:
            _client().key_value_set(key, json.dumps(values))
        else:
            first = json.loads(_client().blocking_key_value_get(key, DAY))
            differing = [field for field in sorted(first | values) if first.get(field) != values.get(field)]
            if differing:
                what = "; ".join(f"{x} is {values.get(x)!r} here and {first.get(x)!r} there" for x in differing[:5])
                raise UserError(f"{name} differs from that of process 0: {what}. {remedy}")
        self.barrier(f"{name} agreed")

    def check_shared(self, file: Path) -> None:
        """UserError in a process that cannot see what the writer has written."""
        self.barrier(f"{file} written")
        for _ in range(100):  # network file systems take a moment
            if file.exists():
                return
            time.sleep(0.1)
        raise UserError(f"{file.parent} is not the same folder on all nodes: give a --workdir on shared storage.")

    def ask(self, seconds: float) -> dict[int, dict | None]:
        """The `state` of each process that this one is connected to: of all, or of process 0. None: no answer."""
        asked = self._peers.keys() - self._gone
        with self._heard:
            self._states = dict.fromkeys(asked)
        self._tell(asked, ask=True)
        with self._heard:
            self._heard.wait_for(lambda: None not in self._states.values(), seconds)
            return dict(self._states)

    def name_of(self, process_id: int) -> str:
        """Like 'process 2 of 4 on gpu007'."""
        if self.num_processes == 1:
            return f"the process on {NODE}"
        node = NODE if process_id == self.process_id else self._peers[process_id][1]
        return f"process {process_id} of {self.num_processes} on {node}"

    def show_stacks(self, process_id: int) -> None:
        """Let a process write the stacks of its threads to its log."""
        if process_id == self.process_id:
            _show_stacks(self.name_of(process_id))
        elif process_id in self._peers:
            self._tell([process_id], stacks=True)
            time.sleep(1)

    def end(self, message: str, code: int) -> NoReturn:
        """`fail` with a message that says itself which process it is about."""
        if self.is_writer:
            self._end_all(message, code)
        if self.process_id == 1 or LOCAL_ID == "0":
            _show(message)
        self._send(code=code, message=message)
        _exit(code)

    def leave(self) -> None:
        """Tell the others that this process ends in good order."""
        self._send(goodbye=True)

    def fail(self, message: str, code: int) -> int:
        """Show one message for the whole job and end all processes with the code; alone, return it to exit with."""
        if self.num_processes == 1:
            _show(message)
            return code
        message = f"process {self.process_id} of {self.num_processes} on {NODE}: {message}"
        if self.is_writer:
            self._end_all(message, code)
        self._send(code=code, message=message)
        time.sleep(5)  # process 0 shows the message, and its answer ends this process
        _show(message)
        _exit(code)

    def fail_with(self, error: BaseException) -> int:
        """`fail` with the message of an exception; alone, one that is a fault of the program is raised again."""
        message, code = message_of(error), exit_code_of(error)
        if message is None and self.num_processes == 1:
            raise error
        if message is None:
            time.sleep(3)  # perhaps another process caused it: then that one's message is the one to show
            message = "".join(traceback.format_exception(error))
        return self.fail(message, code)

    def end_if_several(self, _type: type | None, error: BaseException | None, _traceback: object) -> None:
        """An exit callback: after an error, clean-up must not wait for the other processes."""
        if error is not None and self.num_processes > 1:
            self.fail_with(error)

    def _listen(self, process_id: int, connection: socket.socket, node: str) -> None:
        """Answer what a peer asks until its last words come; without any, it was killed."""
        words = {}
        with contextlib.suppress(OSError, ValueError), connection.makefile(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                words = json.loads(line)
                if "ask" in words:
                    self._tell([process_id], state=self.state())
                elif "stacks" in words:
                    _show_stacks(self.name_of(self.process_id))
                elif "state" in words:
                    with self._heard:
                        self._states[process_id] = words["state"]
                        self._heard.notify()
                else:
                    break
                words = {}
        if "goodbye" in words:
            self._gone.add(process_id)
            return
        message, code = words.get("message"), words.get("code", TransientError.exit_code)
        if not words and (self.is_writer or self.process_id == 1 or LOCAL_ID == "0"):
            message = LOST.format(process_id, self.num_processes, node)
        if self.is_writer:
            time.sleep(0 if words else 0.5)  # what has killed it may have come for all
            self._end_all(message, code)
        _show(message)  # at once: JAX is about to abort this process with a stack trace
        _exit(code)

    def _end_all(self, message: str, code: int) -> None:
        with self._failing:  # of several messages, the first
            _show(message)
            self._send(code=code)
            time.sleep(1)  # the others end before JAX's coordinator does, or they would complain
            _exit(code)

    def _send(self, **words) -> None:
        """To all others, as the last words."""
        self._tell(self._peers, **words)
        for connection, _ in self._peers.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def _tell(self, process_ids: Collection[int], **words) -> None:
        with self._writing:
            for process_id in process_ids:
                with contextlib.suppress(OSError):
                    write(self._peers[process_id][0], words)


def split_address(coordinator: str, num_processes: int, process_id: int) -> tuple[str, int]:
    """Host and port of process 0; ConfigError if they, or the numbers, are invalid."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id} is invalid: "
            "expected HOST:PORT of process 0 and 0 <= process_id < num_processes."
        )
    return host.strip("[]"), int(port)  # brackets of an IPv6 address


def _client():
    from vit_nabirds.parallel.jax_internals import coordination_client  # a process alone needs no JAX to end

    return coordination_client()


def _show_stacks(name: str) -> None:
    say(f"stacks of the threads of {name}:")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.dump_traceback(sys.stderr.fileno() if sys.stderr else 2)


def _show(message: str | None) -> None:
    if message:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        say(f"error: {message}")


def _exit(code: int) -> None:
    """At once: JAX and Orbax would wait for the other processes."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)
