"""How the processes of a job find each other: all others connect to process 0, and both sides prove that they belong.

Anyone who can reach the port may connect. So a process of the job shows that it knows TOKEN, without saying it, and
nobody's silence keeps the others waiting.
"""

import contextlib
import hmac
import ipaddress
import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Collection
from typing import NamedTuple

from vit_nabirds.errors import TransientError, UserError, say
from vit_nabirds.parallel.accelerators import Seen, Share

NODE = os.environ.get("SLURMD_NODENAME", socket.gethostname())
LOCAL_ID = os.environ.get("SLURM_LOCALID")  # process 1 and the first task of each node report what all find out
SLURM_JOB = os.environ.get("SLURM_JOB_ID", "none")
JOB = f"{SLURM_JOB}.{os.environ.get('SLURM_STEP_ID', 'none')}"
# launch/ draws one for each job; where nobody has set it, JOB alone keeps jobs apart.
TOKEN = os.environ.get("VIT_NABIRDS_TOKEN", "").encode()
REMINDER = 20.0  # seconds between two lines about who is missing
PATIENCE = 10.0  # seconds that a connection may take to say who it is
MOST_BYTES = 16_384  # of what it says

Peers = dict[int, tuple[socket.socket, str]]  # connection and node of each


class Guest(NamedTuple):
    """Who has connected, and has not said yet who it is."""

    nonce: str
    said: bytearray
    until: float


def wait_for_others(
    host: str, port: int, num_processes: int, timeout: float, seen: Seen, share: Share
) -> tuple[Peers, list[int] | None]:
    """Process 0: the other processes, and its own share of the GPUs."""
    deadline, peers, cards, nonces = time.monotonic() + timeout, {}, {0: seen}, {}
    reminder = time.monotonic() + REMINDER
    with _listening(host, port, num_processes) as server, selectors.DefaultSelector() as ready:
        ready.register(server, selectors.EVENT_READ)
        while len(peers) < num_processes - 1 and (left := deadline - time.monotonic()) > 0:
            if time.monotonic() >= reminder:
                reminder += REMINDER
                say(f"waiting for process {_missing(peers, num_processes)} of {num_processes}, {left:.0f} s more")
            for key, _ in ready.select(max(0.01, min(left, reminder - time.monotonic(), 1.0))):
                if key.fileobj is server:
                    _let_in(server, ready)
                elif hello := _heard(key, ready, num_processes):
                    number, node, card, nonce = hello
                    peers[number], cards[number], nonces[number] = (key.fileobj, node), card, nonce
            _turn_away(ready, 64 + 2 * num_processes)
        _turn_away(ready, 0)
    shares, problem = {}, None
    if missing := _missing(peers, num_processes):
        problem = TransientError(
            f"process {missing} of {num_processes} did not reach process 0 on {NODE}, port {port}, within "
            f"{timeout:.0f} s: look above for why they ended; give slow ones more time with --start_timeout."
        )
    else:
        try:
            shares = share([cards[number] for number in range(num_processes)])
        except UserError as error:
            problem = error
    for number, (connection, _) in peers.items():
        with contextlib.suppress(OSError):
            answer = {"met": not problem, "own": None if problem else shares[number]}
            write(connection, answer | {"proof": _proof(nonces[number], "met")})
    if problem:
        raise problem
    return peers, shares[0]


def _listening(host: str, port: int, backlog: int) -> socket.socket:
    """On loopback alone if that is where process 0 is; else on all interfaces, for nodes may know it by another one."""
    try:
        if is_loopback(host):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, port), family=family, backlog=backlog)
        ipv6 = dict(family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else {}
        return socket.create_server(("", port), backlog=backlog, **ipv6)
    except OSError as error:
        raise TransientError(
            f"process 0 cannot listen on port {port} of {NODE} ({error.strerror}): choose a free one with "
            "JAX_COORDINATOR_PORT, or --coordinator=HOST:PORT."
        ) from None


def is_loopback(host: str) -> bool:
    """Whether nobody on another machine can be meant to connect."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _let_in(server: socket.socket, ready: selectors.BaseSelector) -> None:
    with contextlib.suppress(OSError):
        connection, _ = server.accept()
        guest = Guest(secrets.token_hex(16), bytearray(), time.monotonic() + PATIENCE)
        connection.setblocking(False)
        connection.send(json.dumps({"nonce": guest.nonce}).encode() + b"\n")
        ready.register(connection, selectors.EVENT_READ, guest)


def _heard(
    key: selectors.SelectorKey, ready: selectors.BaseSelector, num_processes: int
) -> tuple[int, str, Seen, str] | None:
    """Number, node, GPUs and nonce of a process of this job, once it has said them. Strangers are hung up on."""
    connection, guest, part = key.fileobj, key.data, b""
    with contextlib.suppress(OSError):
        part = connection.recv(4096)
    guest.said.extend(part)
    if part and b"\n" not in part and len(guest.said) < MOST_BYTES:
        return None
    ready.unregister(connection)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        hello = json.loads(guest.said)
        number, nonce = hello["process"], str(hello["nonce"])
        if type(number) is int and 0 < number < num_processes:
            if hello["job"] == JOB and hmac.compare_digest(str(hello["proof"]), _proof(guest.nonce, str(number))):
                connection.setblocking(True)
                card = Seen(str(hello["node"]), list(map(str, hello["gpus"])), int(hello["allocated"]))
                return number, card.node, card, nonce
            connection.send(b'{"refused": true}\n')
    connection.close()
    return None


def _turn_away(ready: selectors.BaseSelector, most: int) -> None:
    """Hang up on those who have not said in time who they are, and on the first of too many."""
    guests = [key for key in ready.get_map().values() if key.data]
    now = time.monotonic()
    for place, key in enumerate(sorted(guests, key=lambda key: key.data.until)):
        if key.data.until < now or place < len(guests) - most:
            ready.unregister(key.fileobj)
            key.fileobj.close()


def _missing(peers: Collection[int], num_processes: int) -> str:
    """Those that have not come yet, like '1, 3, 5 and 250 more'."""
    missing = [str(number) for number in range(1, num_processes) if number not in peers]
    return ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")


def report_to_first(
    host: str, port: int, process_id: int, timeout: float, seen: Seen
) -> tuple[socket.socket, list[int] | None]:
    """Other processes: the connection to process 0, and the share of the GPUs."""
    deadline, problem = time.monotonic() + timeout, None
    try:
        socket.getaddrinfo(host, port)
    except OSError:
        raise TransientError(
            f"{NODE} cannot resolve {host!r}, the host of process 0: give an address that all nodes can reach with "
            "--coordinator=ADDRESS:PORT."
        ) from None
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((host, port), timeout=5)
            nonce, challenge = secrets.token_hex(16), str(read(connection)["nonce"])
            proof = _proof(challenge, str(process_id))
            write(connection, {"job": JOB, "process": process_id, **seen._asdict(), "nonce": nonce, "proof": proof})
            connection.settimeout(timeout + 5)
            answer = read(connection)
            if hmac.compare_digest(str(answer.get("proof")), _proof(nonce, "met")):
                if answer["met"]:
                    return connection, answer["own"]
                os._exit(TransientError.exit_code)  # others are missing; process 0 says which
            problem = "another job, or one with another VIT_NABIRDS_TOKEN, answers there"
        except OSError as error:
            problem = error
        except (ValueError, TypeError, KeyError, RecursionError):
            problem = "it ended, or another program answers there"
        time.sleep(0.1)
    if process_id != 1 and LOCAL_ID not in ("0", None):
        os._exit(TransientError.exit_code)
    raise TransientError(
        f"{NODE} got no answer from process 0 at {host}:{port} within {timeout:.0f} s ({problem}): look above for why "
        "process 0 ended; if it did not, the port is closed between the nodes or used by another job (choose one with "
        "JAX_COORDINATOR_PORT), or it starts slowly (--start_timeout)."
    )


def _proof(nonce: str, text: str) -> str:
    """That somebody who knows TOKEN has answered this nonce."""
    return hmac.new(TOKEN, f"{nonce} {text}".encode(), "sha256").hexdigest()


def write(connection: socket.socket, words: dict) -> None:
    connection.sendall(json.dumps(words).encode() + b"\n")


def read(connection: socket.socket) -> dict:
    """The next line, in the connection's timeout, and not a byte more: what follows is for another reader."""
    line, deadline = b"", time.monotonic() + connection.gettimeout()
    while not line.endswith(b"\n") and len(line) < MOST_BYTES and time.monotonic() < deadline:
        if not (byte := connection.recv(1)):
            break
        line += byte
    return json.loads(line)
