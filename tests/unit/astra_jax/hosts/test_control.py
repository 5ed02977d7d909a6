"""Connections of hosts with host 0: who knows the secret gets through, nobody else holds anybody up."""

import contextlib
import json
import queue
import socket
import ssl
import threading
import time

import pytest

from astra_jax.errors import AstraError
from astra_jax.hosts.control import HANDSHAKE_SECONDS, Host0, connect, quietly
from astra_jax.hosts.invitation import Invitation, new_secret
from astra_jax.hosts.keys import context


@pytest.fixture
def listening():
    """A host 0, and its invitation."""
    secret = new_secret()
    with contextlib.closing(Host0("127.0.0.1", 0, secret)) as found:
        yield found, Invitation("127.0.0.1", found.port, secret)


def join(invitation, body=b"", **hello):
    heard = queue.Queue()
    return connect(invitation, hello, heard.put, body), heard


def test_messages_go_both_ways(listening):
    host0, invitation = listening
    member, heard = join(invitation, b"\0" * 100_000, role="host")
    event = host0.events.get(timeout=5)
    assert (event.kind, event.message) == ("joined", {"role": "host", "body": b"\0" * 100_000})
    event.connection.send(b"answer\n", kind="x", number=3)
    assert heard.get(timeout=5) == {"kind": "x", "number": 3, "body": b"answer\n"}
    member.send(kind="more")
    assert host0.events.get(timeout=5).message == {"kind": "more", "body": b""}
    member.close()
    assert host0.events.get(timeout=5).kind == "left"
    assert heard.get(timeout=5) == {}


def test_an_end_is_noticed_on_the_other_side(listening):
    host0, invitation = listening
    _, heard = join(invitation, role="host")
    host0.events.get(timeout=5).connection.close()
    assert heard.get(timeout=5) == {}


def test_another_secret(listening):
    host0, invitation = listening
    with pytest.raises(AstraError, match="does not know the secret: take the invitation that it prints now"):
        join(Invitation("127.0.0.1", invitation.port, new_secret()))
    assert host0.events.empty()


def test_a_stranger_without_a_certificate_is_not_heard(listening):
    host0, invitation = listening
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    with (
        contextlib.suppress(OSError),
        anybody.wrap_socket(socket.create_connection(("127.0.0.1", invitation.port))) as raw,
    ):
        raw.sendall(b'{"role": "host"}\n')
        assert raw.recv(100) == b""
    _, _ = join(invitation, role="host")
    assert host0.events.get(timeout=5).message == {"role": "host", "body": b""}
    assert host0.strangers >= 1


def test_host_0_proves_that_it_knows_the_secret():
    """Somebody who answers in its place does not learn who comes, nor anything of what is said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        imposter = context(new_secret(), "host 0")

        def answer():
            with contextlib.suppress(OSError):
                imposter.wrap_socket(server.accept()[0], server_side=True)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(AstraError, match="does not know the secret"):
            join(Invitation("127.0.0.1", server.getsockname()[1], new_secret()))


def test_silent_connections_hold_nobody_up(listening):
    """Of one address there are few places, which silence does not keep."""
    host0, invitation = listening
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_connection(("127.0.0.1", invitation.port), timeout=5))
        begun = time.monotonic()
        join(invitation, role="host")
        assert time.monotonic() - begun < 3 * HANDSHAKE_SECONDS
        assert host0.events.get(timeout=5).kind == "joined"


@pytest.mark.parametrize(
    "sent",
    [b"no json\n", b"[]\n", b'{"bytes": -1}\n', b'{"bytes": 1e300}\n', b'{"bytes": true}\n', b"[" * 5000 + b"\n"],
    ids=str,
)
def test_what_is_no_message_ends_its_connection_alone(listening, sent):
    host0, invitation = listening
    other, _ = join(invitation, role="host")
    host0.events.get(timeout=5)
    secret = context(invitation.secret, "other")
    with secret.wrap_socket(socket.create_connection(("127.0.0.1", invitation.port))) as wrapped:
        wrapped.sendall(json.dumps({"role": "host"}).encode() + b"\n" + sent)
        assert host0.events.get(timeout=5).kind == "joined"
        assert host0.events.get(timeout=5).kind == "left"
    other.send(kind="here")
    assert host0.events.get(timeout=5).message["kind"] == "here"


def test_who_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(AstraError, match="nobody listens at 127.0.0.1:.*start `astra worker CHECKPOINT` there"):
        join(Invitation("127.0.0.1", port, new_secret()))
    with pytest.raises(AstraError, match=r"'no.such.host.invalid' is not known here"):
        join(Invitation("no.such.host.invalid", 7777, new_secret()))


def test_a_port_in_use_and_an_address_of_another_host(listening):
    _, invitation = listening
    with pytest.raises(AstraError, match=f"TCP port {invitation.port} is in use"):
        Host0("127.0.0.1", invitation.port, new_secret())
    with pytest.raises(AstraError, match="is no address of this host"):
        Host0("203.0.113.7", 0, new_secret())


def test_what_others_say_is_harmless_to_a_terminal():
    assert quietly("\x1b[2Jname\n") == "?[2Jname?" and len(quietly("x" * 10**6)) == 200
