"""Open the port of a server before anything is loaded."""

from __future__ import annotations

import socket

_BACKLOG = 1024


def listen(host: str, port: int) -> socket.socket:
    """Open a port; 0 takes a free one. Raises OSError, one line, for one that is taken or a foreign address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise OSError(f"{host} port {port} cannot be used ({reason}); choose another --port or --host") from error
    return listening
