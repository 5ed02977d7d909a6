"""Sockets at one address of this host."""

import errno
import socket

from astra_jax.errors import AstraError


def listening(kind: socket.SocketKind, address: str, port: int) -> socket.socket:
    """A socket for TCP (`SOCK_STREAM`) or UDP (`SOCK_DGRAM`) that is bound; port 0 for any.

    Raises:
      AstraError: the port is in use, or the address is not this host's.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(address, port, type=kind)[0]
        found = socket.socket(family, kind)
        if kind == socket.SOCK_STREAM:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
        return found
    except (socket.gaierror, UnicodeError):
        raise AstraError(f"the address {address!r} is not known here: give this host's IP address") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            name = "TCP" if kind == socket.SOCK_STREAM else "UDP"
            raise AstraError(f"{name} port {port} is in use on this host: give another one") from None
        raise AstraError(f"{address} is no address of this host ({error.strerror}): see `ip address`") from None
