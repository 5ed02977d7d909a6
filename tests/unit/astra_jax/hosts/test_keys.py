"""Keys are made of the secret, the same everywhere and for each purpose another one."""

import socket
import ssl
import threading

import pytest

from astra_jax.hosts.keys import context, derived

SECRET, OTHER = bytes(range(32)), bytes(range(32, 64))


def test_a_key_for_every_purpose():
    keys = {derived(secret, purpose) for secret in (SECRET, OTHER) for purpose in ("a", "b")}
    assert len(keys) == 4 and all(len(key) == 32 for key in keys)
    assert derived(SECRET, "a") in keys


def handshake(server, client):
    """What became of it on both sides."""
    ends, found = socket.socketpair(), {}

    def one(side, end, made, **options):
        try:
            with made.wrap_socket(end, **options) as wrapped:
                wrapped.settimeout(5)
                wrapped.sendall(b"x")
                found[side] = (wrapped.version(), wrapped.recv(1))
        except OSError as error:
            found[side] = error
        finally:
            end.close()

    other = threading.Thread(target=one, args=("server", ends[0], server), kwargs={"server_side": True})
    other.start()
    one("client", ends[1], client)
    other.join(10)
    return found


def test_who_knows_the_secret_meets():
    assert handshake(context(SECRET, "host 0"), context(SECRET, "other")) == {
        "server": ("TLSv1.3", b"x"),
        "client": ("TLSv1.3", b"x"),
    }


@pytest.mark.parametrize(
    ("server", "client"),
    [
        ((SECRET, "host 0"), (OTHER, "other")),
        ((OTHER, "host 0"), (SECRET, "other")),
        ((SECRET, "host 0"), (SECRET, "host 0")),
    ],
    ids=["client's", "server's", "another side"],
)
def test_who_does_not_is_refused(server, client):
    made = context(*client)
    if client[1] == "host 0":  # with its key, as somebody who connects
        other = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        other.check_hostname, other.verify_mode = False, ssl.CERT_NONE
        made = other
    found = handshake(context(*server), made)
    assert isinstance(found["server"], OSError)


def test_older_versions_are_refused():
    old = context(SECRET, "other")
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    found = handshake(context(SECRET, "host 0"), old)
    assert all(isinstance(error, OSError) for error in found.values())
