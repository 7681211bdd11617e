"""This machine alone: a free port of it, and a beginning for programs that may reach nothing else, to which all
other addresses are errors where they are tried.
"""

from __future__ import annotations

import socket

# Python's own sockets. A datagram socket that is connected asks the kernel which address it would send from,
# no more.
HOOK = """
import socket, sys

def _only_here(event, arguments):
    if event == "socket.getaddrinfo":
        asked = arguments[0]
        here = asked in (None, "", "localhost", socket.gethostname()) or str(asked).startswith(("127.", "::1", "0.0.0.0"))
    elif event in ("socket.connect", "socket.sendto"):
        own, address = arguments
        datagram = event == "socket.connect" and own.type == socket.SOCK_DGRAM
        here = datagram or own.family == socket.AF_UNIX or str(address[0]).startswith(("127.", "::1", "0.0.0.0", "localhost"))
    else:
        return
    if not here:
        raise RuntimeError(f"a network was asked for: {event} {arguments[-1] if event != 'socket.getaddrinfo' else arguments[0]}")

sys.addaudithook(_only_here)
"""


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
