"""An invitation: where host 0 listens, and the secret that all hosts share. Whoever has it may take part."""

import base64
import binascii
import dataclasses
import os
import re
import secrets
from pathlib import Path

from astra_jax.errors import AstraError

SECRET_BYTES = 32
VARIABLE = "ASTRA_SECRET"
EXAMPLE = "astra://10.0.0.1:7777/SECRET"


@dataclasses.dataclass(frozen=True)
class Invitation:
    """Where to go, and what to know. It is a secret as a whole: `str` of it is for who shall take part.

    Attributes:
      address: a name or an address of host 0.
      port: for TCP there.
      secret: 32 bytes.
    """

    address: str
    port: int
    secret: bytes = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return f"astra://{written(self.address, self.port)}/{encoded(self.secret)}"

    @classmethod
    def read(cls, text: str, secret_file: Path | None = None) -> "Invitation":
        """Of an invitation, or of an address and a port, where a file or the environment has the secret.

        Raises:
          AstraError: it is neither, or the secret is nowhere, or none.
        """
        match = re.fullmatch(r"astra://(?P<where>[^/\s]+)/(?P<secret>[^/\s]+)/?", text.strip())
        if match:
            return cls(*parse_address(match["where"], "--join"), decoded(match["secret"], "the invitation"))
        if "/" in text:
            raise AstraError(f"--join: this is no invitation: copy all of it; it looks like {EXAMPLE}")
        where, secret = parse_address(text, "--join"), given_secret(secret_file)
        if secret is None:
            raise AstraError(
                f"--join {text}: the secret is missing: give the whole invitation, or --secret-file, or set {VARIABLE}"
            )
        return cls(*where, secret)


def new_secret() -> bytes:
    """32 bytes that nobody can guess."""
    return secrets.token_bytes(SECRET_BYTES)


def encoded(secret: bytes) -> str:
    """A secret as 43 letters, digits, - and _."""
    return base64.urlsafe_b64encode(secret).decode().rstrip("=")


def decoded(text: str, what: str) -> bytes:
    """The inverse of `encoded`. Raises AstraError for anything else; the message does not repeat it."""
    try:
        secret = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise AstraError(
            f"{what} has a secret of {len(text)} characters that is none: it has {len(encoded(bytes(32)))} letters, "
            "digits, - and _; `astra worker` makes one"
        )
    return secret


def given_secret(file: Path | None) -> bytes | None:
    """The secret in a file, or in the environment; None where there is none.

    Raises:
      AstraError: the file cannot be read, or it is no secret.
    """
    if file is not None:
        try:
            return decoded(file.read_text().strip(), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise AstraError(f"--secret-file {file}: cannot be read ({error}): check the path") from error
    text = os.environ.get(VARIABLE)
    return None if text is None else decoded(text.strip(), VARIABLE)


def parse_address(text: str, option: str) -> tuple[str, int]:
    """`"10.0.0.1:7777"`, `"pi.local:7777"` or `"[fd00::1]:7777"` -> address and port.

    Raises:
      AstraError: it is none of these.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([A-Za-z0-9_.-]+)):([0-9]{1,5})", text.strip())
    if not match or not 0 < int(match[3]) < 65536 or ".." in text:
        raise AstraError(f"{option} is {text!r}; write an address and a port, such as 10.0.0.1:7777 or [fd00::1]:7777")
    return match[1] or match[2], int(match[3])


def written(address: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
