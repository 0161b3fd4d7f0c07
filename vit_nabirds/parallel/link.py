"""The connections between process 0 of a job and the others: they meet on them, and the end of one ends all.

JAX's own meeting ends in a stack trace when a process is missing, and it notices the loss of one a minute later.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from typing import NoReturn

from vit_nabirds.errors import UserError, message_of

NODE = os.environ.get("SLURMD_NODENAME", socket.gethostname())
JOB = f"{os.environ.get('SLURM_JOB_ID', 'none')}.{os.environ.get('SLURM_STEP_ID', 'none')}"
LOCAL_ID = os.environ.get("SLURM_LOCALID")  # of what all find out, process 1 and the first task of each node speak
GOODBYE = "goodbye"
LOST = (
    "1 process {} of {} on {} ended without a word: killed, or out of memory? See what srun says of it, or "
    "`sacct -j JOB`. The same command goes on from the last checkpoint."
)

_number, _count = 0, 1  # of this process, of all
_connections: dict[int, socket.socket] = {}  # at process 0 to all others by their numbers, elsewhere to process 0
_failing = threading.Lock()


def meet(coordinator: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Connect with the other processes on the port of `coordinator`, which is free again after; UserError when one
    is missing after `timeout` seconds. From then on, the end of any of them ends this one."""
    global _number, _count
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")  # of an IPv6 address
    if process_id == 0:
        others = _wait_for_others(num_processes, int(port), timeout)
    else:
        others = _report_to_first(process_id, host, int(port), timeout)
    _number, _count = process_id, num_processes
    for number, (connection, _) in others.items():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}.items():  # a node without power
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        _connections[number] = connection
    for number, (connection, node) in others.items():  # once all can be told of what the first one heard says
        threading.Thread(target=_listen, args=[number, connection, node], daemon=True).start()


def process_id() -> int:
    """This process's number, also before JAX has touched a device."""
    return _number


def is_alone() -> bool:
    return _count == 1


def part() -> None:
    """Tell the others that this process ends in good order."""
    _send(GOODBYE)


def fail(message: str, code: int) -> NoReturn:
    """Show the message and end all processes of the job with the code; of several that fail, one is shown."""
    word = f"{code} process {_number} of {_count} on {NODE}: {message}"
    if _number == 0:
        _end_all(word)
    _send(word)
    time.sleep(5)  # process 0 shows it, and its answer ends this process
    _say(word)
    _exit(code)


def fail_with(error: BaseException) -> NoReturn:
    """`fail` with what is to be told of the error."""
    if (message := message_of(error)) is None:
        time.sleep(3)  # it may be the consequence of another process's, whose message then is the one to show
        message = "".join(traceback.format_exception(error))
    fail(message, 1)


def end_if_several(_type, error: BaseException | None, _traceback) -> None:
    """An exit callback: after an error, do not wait for the other processes in clean-up."""
    if error is not None and not is_alone():
        fail_with(error)


def _listen(number: int, connection: socket.socket, node: str) -> None:
    """Hear what the process at the other end says last: goodbye, or exit code and message; nothing when killed."""
    word = ""
    with contextlib.suppress(OSError), connection.makefile(encoding="utf-8", errors="replace") as stream:
        word = stream.read()
    if word == GOODBYE:
        return
    if not word and _number == 0:
        time.sleep(0.5)  # what has killed it may have come for all
        word = LOST.format(number, _count, node)
    elif not word:  # at once, for JAX is about to abort this process with a stack trace
        word = LOST.format(number, _count, node) if _number == 1 or LOCAL_ID == "0" else "1"
    if _number == 0:
        _end_all(word)
    _say(word)
    _exit(_code(word))


def _end_all(word: str) -> NoReturn:
    with _failing:
        _say(word)
        _send(str(_code(word)))
        time.sleep(1)  # they end before JAX's coordinator does, of which they would complain
        _exit(_code(word))


def _exit(code: int) -> NoReturn:
    """At once: what JAX and Orbax do at exit would wait for the other processes."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


def _say(word: str) -> None:
    if message := word.partition(" ")[2]:
        sys.stderr.flush()
        os.write(2, f"error: {message}\n".encode())


def _code(word: str) -> int:
    return int(word.partition(" ")[0])


def _send(word: str) -> None:
    for connection in _connections.values():
        with contextlib.suppress(OSError):
            connection.sendall(word.encode())
            connection.shutdown(socket.SHUT_WR)


def _wait_for_others(num_processes: int, port: int, timeout: float) -> dict[int, tuple[socket.socket, str]]:
    """Process 0: connection and node of each other process."""
    deadline, come = time.monotonic() + timeout, {}
    ipv6 = dict(family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else {}
    try:
        server = socket.create_server(("", port), backlog=num_processes, **ipv6)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} of {NODE} ({error.strerror}): choose a free one with "
            "JAX_COORDINATOR_PORT, or --coordinator=HOST:PORT."
        ) from None
    with server:
        while len(come) < num_processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):
                connection, _ = server.accept()
                connection.settimeout(5)
                job, number, node = connection.recv(500).decode().split()
                if job == JOB and 0 < int(number) < num_processes:
                    come[int(number)] = connection, node
    missing = [str(number) for number in range(1, num_processes) if number not in come]
    for connection, _ in come.values():
        with contextlib.suppress(OSError):
            connection.sendall(b"wait" if missing else b"meet")
    if missing:
        raise UserError(
            f"of {num_processes} processes, {', '.join(missing)} did not come to process 0 on {NODE}, port {port}, "
            f"within {timeout:.0f} s: look above for why they ended; give slow ones more time with --start_timeout."
        )
    return come


def _report_to_first(process_id: int, host: str, port: int, timeout: float) -> dict[int, tuple[socket.socket, str]]:
    """Other processes: the connection to process 0."""
    deadline = time.monotonic() + timeout
    try:
        socket.getaddrinfo(host, port)
    except OSError:
        raise UserError(
            f"{NODE} cannot resolve {host!r}, the host of process 0: give an address that all nodes can reach with "
            "--coordinator=ADDRESS:PORT."
        ) from None
    problem = "it ended"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            connection.sendall(f"{JOB} {process_id} {NODE}".encode())
            connection.settimeout(timeout + 5)
            answer = connection.recv(4)
        except OSError as error:
            answer, problem = b"", error
        if answer == b"meet":
            return {0: (connection, host)}
        if answer == b"wait":
            os._exit(1)  # others are missing; process 0 says which
        time.sleep(0.1)
    if process_id != 1 and LOCAL_ID not in ("0", None):
        os._exit(1)
    raise UserError(
        f"{NODE} got no answer from process 0 at {host}:{port} within {timeout:.0f} s ({problem}): look above for "
        "why process 0 ended; if it did not, the port is closed between the nodes or used by another job (choose "
        "one with JAX_COORDINATOR_PORT), or it starts slowly (--start_timeout)."
    )
