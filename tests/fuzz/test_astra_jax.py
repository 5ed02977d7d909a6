"""Mutations of what `astra_jax` reads: lists and addresses of options, pictures and their preprocessing, tokenizers,
messages between processes and hosts."""

import asyncio
import contextlib
import io
import ipaddress
import itertools
import json
import math
import re
import shutil
import socket
import struct
import types
import typing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from astra_jax.cli.arguments import Integers, Numbers, Texts
from astra_jax.codecs.config import codec_and_predictor
from astra_jax.hosts import datagrams
from astra_jax.hosts.agreement import differences
from astra_jax.hosts.control import LONGEST, Connection
from astra_jax.hosts.distributed import parse_address
from astra_jax.hosts.remote import OF_CONTROL, OF_DATA, Peer, Remote
from astra_jax.inputs.images import MAX_PIXELS, ImageProcessor, decode_image
from astra_jax.inputs.tokenizer import Tokenizer
from astra_jax.mesh.sharding import parse_devices
from tests.fuzz.harness import REFUSED, attempt, fuzz
from tests.fuzz.mutations import byte_strings, json_files, lines, trees, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# Options


def parsed(kind, text):
    """What an option with a list gets of a text."""
    return typing.get_args(kind)[1].instance_from_str([text])


@fuzz
@given(lines("1,16,32", "4", "8, 16"))
def test_lists_of_integers(text):
    found = attempt("a list of whole numbers", parsed, Integers, text)
    if found is not REFUSED:
        assert re.fullmatch(r"[+-]?\d+(,[+-]?\d+)*", "".join(text.split()), re.ASCII) and found
        assert all(type(number) is int and abs(number) < 2**63 for number in found)


@fuzz
@given(lines("1,1,0.5", "0.25", "1e-3, 2"))
def test_lists_of_numbers(text):
    found = attempt("a list of numbers", parsed, Numbers, text)
    if found is not REFUSED:
        assert "".join(text.split()).isascii() and "_" not in text and found
        assert all(type(number) is float and math.isfinite(number) for number in found)


@fuzz
@given(lines("10mbit,20mbit", "on", "astra, sp"))
def test_lists_of_texts(text):
    found = attempt("a list of texts", parsed, Texts, text)
    assert found is REFUSED or (found and all(word and word == word.strip() for word in found))


@fuzz
@given(lines("4", "2x4", "16x1"))
def test_devices(text):
    found = attempt("--devices", parse_devices, text)
    assert found is REFUSED or (
        re.fullmatch(r"(\d+x)?\d+", text.strip(), re.ASCII) and all(0 < number < 2**31 for number in found)
    )


@fuzz
@given(lines("10.0.0.1:7777", "127.0.0.1:65534", "[::1]:7777"))
def test_addresses(text):
    asked = []

    def look_up(name, *rest, **options):  # as without a network: only addresses are known
        asked.append(name)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (socket.inet_ntoa(socket.inet_aton(name)), 0))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up)
        found = attempt("--coordinator", parse_address, text)
    if found is not REFUSED:
        assert text.strip().isascii() and 0 < found[1] < 65536 and asked
        assert not ipaddress.ip_address(found[0]).is_global


@fuzz
@given(lines("vq", "nested-pq+mlp", "vq+linear"))
def test_codecs(text):
    found = attempt("a codec's name", codec_and_predictor, text)
    assert found is REFUSED or "+".join(found).removesuffix("+none") == text.removesuffix("+none").removesuffix("+")


# Pictures and how they are made ready

PREPROCESSING = (
    ImageProcessor(size=(8, 8)).to_hf(),
    ImageProcessor(size=(10, 12), crop_size=(8, 8), image_mean=(0.5,), image_std=(0.5,)).to_hf(),
    {"feature_extractor_type": "ViTFeatureExtractor", "size": 8, "resample": 2, "image_mean": [0, 0.5, 1]},
)
STEPS = {"do_pad": True, "do_center_crop": True, "crop_size": 6, "size": {"shortest_edge": 8}, "resample": 5}
PICTURE = Image.fromarray(np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3))


def processor_of(path):
    from checkpoints.files import read_json

    return ImageProcessor.from_hf(read_json(path))


@fuzz
@given(json_files(*PREPROCESSING, known=STEPS))
def test_preprocessing(folder, content):
    path = folder / "preprocessor_config.json"
    path.write_bytes(content)
    processor = attempt("preprocessor_config.json", processor_of, path)
    if processor is REFUSED:
        return
    assert processor.height * processor.width <= math.prod(processor.size) <= MAX_PIXELS
    assert all(type(side) is int and side > 0 for side in (*processor.size, processor.height, processor.width))
    assert attempt("a preprocessor_config.json of ours", ImageProcessor.from_hf, processor.to_hf()) == processor
    if math.prod(processor.size) < 1e6:
        pixels = attempt("making a picture ready", processor, [PICTURE])
        shape = (1, processor.height, processor.width, processor.channels)
        assert pixels is REFUSED or (pixels.shape == shape and np.isfinite(pixels).all())


def files_of(picture):
    for kind, options in (
        ("PNG", {}), ("JPEG", {}), ("GIF", {}), ("BMP", {}), ("WEBP", {}), ("TIFF", {}), ("PPM", {}), ("ICO", {}),
        ("TIFF", {"compression": "tiff_lzw"}), ("EPS", {}),
    ):  # fmt: skip
        file = io.BytesIO()
        picture.save(file, kind, **options)
        yield file.getvalue()


@fuzz
@given(st.sampled_from(list(files_of(PICTURE))).flatmap(byte_strings))
def test_pictures(content):
    picture = attempt("a picture", decode_image, content, "a.png")
    if picture is not REFUSED:
        assert 0 < picture.width * picture.height <= MAX_PIXELS
        assert not content.startswith(b"%!PS"), "a program was run to read it"
        ready = attempt("making a picture ready", ImageProcessor(size=(8, 8)), [picture])
        assert ready.shape == (1, 8, 8, 3) and np.isfinite(ready).all()


# Tokenizers

VOCABULARY = 64
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
MERGES = ["h e", "l l", "he ll", "hell o"]
RUN = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTok", "tokenization_x.XTok"]}, "tokenizer_class": "XTok"}
SETTINGS = {"model_max_length": 8, "do_lower_case": True, "pad_token": "[PAD]", "add_bos_token": True, **RUN}


def fast(model, **more):
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    inner = Tokenizer(model)
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["[UNK]", "[PAD]"])
    return json.loads(inner.to_str()) | more


def tokenizers():
    """Kind -> the files of a tokenizer of it: name -> a JSON tree or text."""
    from tokenizers import models

    words = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "hello", "world", *LETTERS])}
    pieces = {piece: i for i, piece in enumerate([*LETTERS, "he", "ll", "hell", "hello"])}
    bpe = models.BPE(vocab=pieces, merges=[tuple(merge.split()) for merge in MERGES], unk_token=None)
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    return [
        {"tokenizer.json": fast(models.WordLevel(words, "[UNK]")), "tokenizer_config.json": plain},
        {"tokenizer.json": fast(bpe), "tokenizer_config.json": plain, "special_tokens_map.json": {"eos_token": "o"}},
        {
            "vocab.json": pieces | {"<|endoftext|>": 40},
            "merges.txt": "\n".join(["#version: 0.2", *MERGES]),
            "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"},
        },
        {"vocab.txt": "\n".join(words), "tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}},
    ]


@st.composite
def tokenizer_files(draw):
    """The files of a tokenizer, of which one is mutated, and sometimes missing."""
    files = draw(st.sampled_from(tokenizers()))
    name = draw(st.sampled_from(sorted(files)))
    content = files[name]
    mutant = draw(
        json_files(content, known=SETTINGS)
        if isinstance(content, dict)
        else lines(content).map(lambda text: text.encode("utf8", "surrogatepass")) | byte_strings(content.encode())
    )
    whole = {n: written(c) if isinstance(c, dict) else c.encode() for n, c in files.items()}
    return whole | {name: mutant}


def read_tokenizer(folder):
    tokenizer = Tokenizer(folder, VOCABULARY)
    ids = tokenizer.encode("hello world, é 😀 [UNK]", 8)
    return ids, tokenizer.decode(ids), [tokenizer.stream(ids[:1])(token) for token in ids[1:]]


@fuzz
@given(tokenizer_files())
def test_tokenizers(folder, files):
    here, ran = folder / "tokenizer", folder / "ran"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    (here / "tokenization_x.py").write_text(f"open({str(ran)!r}, 'w')\nclass XTok: pass\n")
    for name, content in files.items():
        (here / name).write_bytes(content)
    found = attempt("a tokenizer's files", read_tokenizer, here)
    assert not ran.exists(), "code of the folder was run"
    if found is not REFUSED:
        ids, text, steps = found
        assert type(ids) is list and len(ids) <= 8 and all(type(token) is int and 0 <= token < 64 for token in ids)
        assert type(text) is str and all(type(step) is str for step in steps)


# Messages and packets of hosts

CHANNELS = itertools.count(1 << 20)


async def received(content):
    """All messages of a connection that says these bytes and ends."""
    reader, messages = asyncio.StreamReader(limit=LONGEST), []
    reader.feed_data(content)
    reader.feed_eof()
    writer = types.SimpleNamespace(get_extra_info=lambda name: ("127.0.0.1", 1))
    connection = Connection(None, reader, writer)
    while True:
        message = await connection.receive()
        messages.append(message)
        if not reader._buffer:
            return messages


MESSAGES = (
    {"kind": "run", "pass": 1, "order": [0, 1]},
    {"kind": "read", "bytes": 3, "long": False, "peers": {"1": ["127.0.0.1", 7777, "aa"]}},
    {"role": "host", "name": "pi", "same": {"jax": "1"}, "port": 7},
)


@fuzz
@given(st.lists(trees(*MESSAGES).map(written) | json_files(*MESSAGES), min_size=1, max_size=3), st.binary(max_size=5))
def test_messages(parts, body):
    content = b"".join(part + b"\n" + body for part in parts)
    found = attempt("messages of a host", lambda: asyncio.run(received(content)), refusals=(ConnectionError,))
    if found is not REFUSED:
        assert all(type(message) is dict and "bytes" not in message for message in found)
        assert sum(len(message["body"]) for message in found) <= len(content)


INNER = (
    datagrams._DATA.pack(datagrams.DATA, 1, 3, 0, 2, 0) + b"codes",
    datagrams._DATA.pack(datagrams.DATA, 0, datagrams.TOLD, 0, 1, 0) + b"{}",
    datagrams._PING.pack(datagrams.PING, 10**15, 7),
    datagrams._PONG.pack(datagrams.PONG, 10**15),
    datagrams._LIST.pack(datagrams.ASK, 2) + struct.pack("<2Q", 0, 5),
    datagrams._LIST.pack(datagrams.VOID, 1) + struct.pack("<Q", 3),
    datagrams._LATE.pack(datagrams.LATE, 3, 9, 12),
)


@pytest.fixture(scope="module")
def member():
    """A host, and how another one, which knows the keys, seals what it says to it."""
    key, counters = bytes(32), (itertools.count(1), itertools.count(1))
    with contextlib.closing(datagrams.Datagrams("127.0.0.1")) as link:
        link.adapts, link.told = True, lambda number, message: None
        link.enter(0, key)
        link.meet({1: Peer("127.0.0.1", 9)})
        link.begin(1, [0, 1])
        other = Remote(0, 1, key, Peer("127.0.0.1", link.port))

        def sealed(inner, kind=OF_DATA):
            counter = next(counters[kind])
            outer = datagrams._OUTER.pack(kind, 1, counter)
            return outer + other.to.encrypt(datagrams._NONCE.pack(kind, counter), inner, outer)

        yield link, sealed


@fuzz
@given(st.sampled_from(INNER).flatmap(byte_strings), st.sampled_from([OF_DATA, OF_CONTROL]), st.data())
def test_packets(member, inner, kind, data):
    """Of a host that has the keys, and of a stranger: whatever comes, the next packet is read."""
    link, sealed = member
    packet = sealed(inner, kind)
    strange = data.draw(byte_strings(packet))
    attempt("a sealed packet", link._open, packet, ("127.0.0.1", 9), refusals=(Exception,))
    if strange != packet:
        assert attempt("a forged packet", link._open, strange, ("127.0.0.1", 9), refusals=(Exception,)) is REFUSED
    assert set(link._peers) == {1} and 0 <= link._held <= datagrams.MOST_BYTES
    channel = next(CHANNELS)
    link._open(sealed(datagrams._DATA.pack(datagrams.DATA, 1, channel, 0, 1, 0) + b"next"), ("127.0.0.1", 9))
    assert link.wait(channel, [1], [1]) == [{0: b"next"}]


@fuzz
@given(trees({"jax": "0.10.2", "JAX_ENABLE_X64": "False"}))
def test_what_hosts_say_that_they_have(theirs):
    mine = {"jax": "0.10.2", "JAX_ENABLE_X64": "False"}
    found = attempt("what a host has", differences, mine, theirs)
    assert bool(found) == (theirs != mine) and found.isprintable() and len(found) < 3000
