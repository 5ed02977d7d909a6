"""Invitations are read as they were printed, and what is none is said in a line that does not repeat a secret."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.errors import AstraError
from astra_jax.hosts.invitation import VARIABLE, Invitation, encoded, parse_address, written

SECRET = bytes(range(100, 132))


@given(
    st.sampled_from(["10.0.0.1", "pi.local", "fe80::1", "::1"]),
    st.integers(1, 65535),
    st.binary(min_size=32, max_size=32),
)
def test_there_and_back(address, port, secret):
    made = Invitation(address, port, secret)
    assert Invitation.read(f" {made}\n") == made
    assert encoded(secret) not in repr(made)
    assert parse_address(written(address, port), "--join") == (address, port)


def test_a_secret_of_its_own(tmp_path, monkeypatch):
    expected = Invitation("10.0.0.1", 7777, SECRET)
    file = tmp_path / "secret"
    file.write_text(encoded(SECRET) + "\n")
    assert Invitation.read("10.0.0.1:7777", file) == expected
    with pytest.raises(AstraError, match=f"the secret is missing: give the whole invitation, or .* set {VARIABLE}"):
        Invitation.read("10.0.0.1:7777")
    monkeypatch.setenv(VARIABLE, encoded(SECRET))
    assert Invitation.read("10.0.0.1:7777") == expected


@pytest.mark.parametrize("secret", ["", "short", encoded(SECRET)[:-1], encoded(SECRET) + "A", "?" * 43, "ä" * 43])
def test_no_secret(tmp_path, monkeypatch, secret):
    file = tmp_path / "secret"
    file.write_text(secret)
    with pytest.raises(AstraError, match=rf"secret has a secret of {len(secret)} characters that is none") as error:
        Invitation.read("10.0.0.1:7777", file)
    assert not secret or secret not in str(error.value).replace(str(file), "")
    with pytest.raises(AstraError, match="cannot be read"):
        Invitation.read("10.0.0.1:7777", tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text", ["astra://10.0.0.1:7777", "http://10.0.0.1:7777/x", "astra://10.0.0.1/" + encoded(SECRET), "a/b",
             "a..b:7777", "10.0.0.1", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:port", "[10.0.0.1]", ":7777", "\0:7777",
             "a b:7777"]
)  # fmt: skip
def test_no_invitation(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, encoded(SECRET))
    with pytest.raises(AstraError, match="--join") as error:
        Invitation.read(text)
    assert "\n" not in str(error.value) and encoded(SECRET) not in str(error.value)
