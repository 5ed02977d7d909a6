"""What the shared secret becomes: keys of TLS connections, which both sides know before they meet, and of datagrams.

Host 0 and all others have a key pair each, both made of the secret, so that TLS 1.3 proves to each side that the other
one knows it; nothing else about a certificate counts, not even a clock. Recorded connections stay closed also to who
learns the secret later, as TLS agrees on new keys each time. Keys of datagrams are made of a random one, which host 0
tells every host over TLS.
"""

import datetime
import os
import ssl
import tempfile
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

Side = Literal["host 0", "other"]


def derived(secret: bytes, purpose: str) -> bytes:
    """32 bytes for one purpose, which say nothing of those for others (HKDF with SHA-256)."""
    return HKDF(hashes.SHA256(), 32, None, f"astra-jax {purpose}".encode()).derive(secret)


def context(secret: bytes, side: Side) -> ssl.SSLContext:
    """TLS 1.3 for one side of a connection, which accepts a peer that knows the secret as the other side, and no other
    one."""
    server, other = side == "host 0", "other" if side == "host 0" else "host 0"
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    found.minimum_version = ssl.TLSVersion.TLSv1_3
    found.check_hostname = False
    found.verify_mode = ssl.CERT_REQUIRED
    if server:
        found.num_tickets = 0  # a connection is never taken up again
    certificate, key = _certificate(secret, side)
    with tempfile.TemporaryDirectory() as folder:  # OpenSSL reads keys from files alone
        path = os.path.join(folder, "pem")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(certificate + key)
        found.load_cert_chain(path)
    found.load_verify_locations(cadata=_certificate(secret, other)[0].decode())
    return found


def _certificate(secret: bytes, side: str) -> tuple[bytes, bytes]:
    """A certificate that signs itself, the same wherever it is made, and its key (PEM)."""
    key = Ed25519PrivateKey.from_private_bytes(derived(secret, f"TLS key of {side}"))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, side)])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(1970, 1, 2))  # whatever a host's clock says
        .not_valid_after(datetime.datetime(9999, 12, 31))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, None)
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return made.public_bytes(serialization.Encoding.PEM), pem
