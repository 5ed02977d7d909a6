"""Keep a checkpoint loaded on several hosts, and answer any number of requests with it.

    astra worker CHECKPOINT                      on the first host: prints an invitation
    astra worker --join INVITATION               on every other one: copies the checkpoint from there
    astra run CHECKPOINT --join INVITATION --image cat.png

Hosts may come and go: a request is answered by those that are there. The tokens are split over them, and in every block
they send each other codes in sealed datagrams. What one host knows of another goes over TLS, and only who has the
invitation can take part or ask. Each host prints which ports have to be let in where there is a firewall.
"""

import contextlib
import dataclasses
import ipaddress
import socket
import traceback
from pathlib import Path
from typing import Annotated

import tyro

from astra_jax.errors import AstraError, first_line
from astra_jax.hosts.company import Client, Company
from astra_jax.hosts.control import Connection
from astra_jax.hosts.datagrams import Late
from astra_jax.hosts.fellow import Fellow
from astra_jax.hosts.invitation import Invitation, given_secret, new_secret, parse_address, written
from astra_jax.report import Report
from astra_jax.terminal import complain, one_line, write
from eval.service.company import Host0, Other, heard, same, told
from eval.service.copying import Offer, fetch
from eval.service.messages import Done, Failed, Message, pack
from eval.service.screen import Screen
from eval.service.service import Loading

PORT = 7777  # by default, of host 0


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `astra worker`."""

    checkpoint: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = None
    """A checkpoint with codebooks; the same on every host. With --join it may be left out: it is then copied from the
    first host and kept in the user's cache."""
    join: str | None = None
    """What the worker on the first host printed; or its address and port, where the secret is given otherwise."""
    listen: str | None = None
    """An address of this host and maybe a port: where others reach it. By default the one on the way out, or to the
    first host; port 7777 on the first host, any that is free on others."""
    secret_file: Path | None = None
    """A file with the secret of the invitation; by default ASTRA_SECRET has it, or the first host makes one."""
    late: Late = "wait"
    """What becomes of codes that come late: they are waited for, or predicted. The first host says it for all."""
    loading: Annotated[Loading, tyro.conf.arg(name="")] = Loading()


def way_out() -> str:
    """The private address of this host on the way out, or 127.0.0.1 where there is none. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("10.255.255.255", 9))
        found = ipaddress.ip_address(probe.getsockname()[0])
        if found.is_private:
            return str(found)
    return "127.0.0.1"


def place(listen: str | None, default: str, port: int) -> tuple[str, int]:
    """Where to listen.

    Raises:
      AstraError: it is no address, or one that stands for all.
    """
    if listen is None:
        return default, port
    address, number = listen, port
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(listen)
        listen = written(listen, port)
    if ":" in listen:
        address, number = parse_address(listen, "--listen")
    if address in ("0.0.0.0", "::", ""):
        raise AstraError(f"--listen {listen}: others cannot reach that: give one address of this host")
    return address, number


def main(args: Args) -> None:
    """Runs `astra worker`."""
    if args.join is not None:
        _other(args, args.join)
    elif args.checkpoint is not None:
        _first(args, args.checkpoint)
    else:
        raise AstraError("give a CHECKPOINT, or --join with the invitation of a host that has one")


def _first(args: Args, checkpoint: Path) -> None:
    welcome, given = told(checkpoint, args.loading), given_secret(args.secret_file)
    address, port = place(args.listen, way_out(), PORT)
    adapts = args.loading.groups is None
    secret, offer = given or new_secret(), Offer(checkpoint)
    company = Company(address, port, secret, same(), welcome, args.late, adapts, offer, _say)
    try:
        service = Host0(checkpoint, args.loading, company)
        screen, where = Screen(Report("worker"), ()), written(address, company.invitation.port)
        for note in service.notes:
            screen.print(note)
        join = where if given else company.invitation  # a secret that was given is not shown
        _say(f"this host: {where} by TCP, {company.link.port} by UDP")
        _say(f"others take part with: astra worker --join {join}")
        _say(f"ready: astra run {checkpoint} --join {join}")
        serve(service, company)
    finally:
        company.close()


def serve(service: Host0, company: Company) -> None:
    """Answers who asks, one after the other, without end."""
    strangers = 0
    while True:
        client = company.asked.get()
        if client.connection.open:
            _answer(service, client)
        if company.strangers > strangers:
            strangers = company.strangers
            _say(f"{strangers:,} connections so far were of strangers, who do not know the secret")


def _other(args: Args, join: str) -> None:
    if (args.late, args.loading) != ("wait", Loading()):
        raise AstraError("--join: the first host says for all what is loaded, and how: leave other options out")
    invitation = Invitation.read(join, args.secret_file)
    address, port = (None, 0) if args.listen is None else place(args.listen, "", 0)
    checkpoint = args.checkpoint or fetch(invitation, _say)
    fellow = Fellow(invitation, same(), address, port)
    work = Other(checkpoint, heard(fellow.told, checkpoint), fellow.link)
    fellow.ready()
    _say(f"host {fellow.number}: ready; UDP port {fellow.link.port}")
    fellow.stay(work, _say)


def _say(line: str) -> None:
    write(f"{one_line(line)}\n")


def _tell(connection: Connection, message: Message) -> None:
    kind, body = pack(message)
    connection.send(body, kind=kind)


def _answer(service: Host0, client: Client) -> None:
    """Answers one request. Whatever fails is the answer, and the next one is taken."""
    connection = client.connection
    try:
        if client.message.get("check"):
            _tell(connection, service.check())
            _tell(connection, Done())
            return
        if client.message.get("digest") != service.checkpoint.digest:
            raise AstraError(f"the workers have loaded {service.name}, another checkpoint: ask for it, or start others")
        for message in service.answer_one(client.message["body"]):
            _tell(connection, message)
            if not connection.open:
                break  # the rest of a text is for nobody
        _tell(connection, Done())
    except AstraError as error:
        _tell(connection, Failed(str(error)))
    except Exception as error:
        _tell(connection, Failed(f"the workers failed: {first_line(error)}"))
        complain(traceback.format_exc())
    finally:
        connection.close()
