"""Mutations of what `eval` reads: rates, losses, traces, profiles, accuracies, requests to a worker, tables, labels."""

import io
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astra_jax.codecs.config import VQConfig
from astra_jax.serving.sampling import Draws, Sampling
from eval.cost.device_profile import read_profile
from eval.datasets.labelled import DataArgs
from eval.datasets.labels import match
from eval.datasets.sources import read
from eval.network.lab import parse_packet_loss
from eval.network.model import parse_rate, parse_seconds
from eval.network.traces import read_trace, transfer_end
from eval.quality.reached import read_quality
from eval.service.requests import Request, Wishes, packed, unpacked
from tests.fuzz.harness import REFUSED, attempt, fuzz
from tests.fuzz.mutations import byte_strings, json_files, lines, trees, written

PLAIN = re.compile(r"\s*\d+(\.\d*)?\s*[a-z%]+\s*", re.ASCII | re.IGNORECASE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# Options


@fuzz
@given(lines("10mbit", "0.5 gbit", "64kbit"))
def test_rates(text):
    rate = attempt("a rate", parse_rate, text)
    assert rate is REFUSED or (PLAIN.fullmatch("".join(text.split())) and 1 <= rate <= 1e24)


@fuzz
@given(lines("2ms", "0us", "1.5 s"))
def test_seconds(text):
    seconds = attempt("a time", parse_seconds, text)
    assert seconds is REFUSED or (PLAIN.fullmatch("".join(text.split())) and 0 <= seconds <= 1e15)


@fuzz
@given(lines("5%", "0%", "12.5 %"))
def test_loss(text):
    loss = attempt("a share of lost packets", parse_packet_loss, text)
    assert loss is REFUSED or (PLAIN.fullmatch("".join(text.split())) and 0 <= loss <= 1)


# Files for bench and plan

TRACE = "seconds,bits_per_second\n0,1e6\n0.5,0\n2,3000000\n"


@fuzz
@given(lines(TRACE).map(lambda text: text.encode("utf8", "surrogatepass")) | byte_strings(TRACE.encode()))
def test_traces(folder, content):
    path = folder / "link.csv"
    path.write_bytes(content)
    trace = attempt("a link's trace", read_trace, str(path))
    if trace is REFUSED:
        return
    assert np.isfinite([*trace.edges, *trace.sent]).all() and list(trace.edges) == sorted(set(trace.edges))
    for start in (0.0, trace.edges[-1] / 3):
        end = attempt("a transfer over a trace", transfer_end, trace, start, 1e6)
        assert start <= end < math.inf
    # A byte order mark and white space around values are let through, digits of other scripts are not.
    assert "".join(content.decode("utf-8-sig").split()).isascii()


PROFILE = {"name": "pi", "flops_per_second": 2.5e10}


@fuzz
@given(json_files(PROFILE, PROFILE | {"flops_per_second": 10**12}))
def test_profiles(folder, content):
    path = folder / "device.json"
    path.write_bytes(content)
    profile = attempt("a device's profile", read_profile, path)
    if profile is not REFUSED:
        assert 1 <= profile.flops_per_second <= 1e21 and type(profile.flops_per_second) in (int, float)
        assert 0 < len(profile.name) <= 200 and profile.name.isprintable()


def rows(metric, value):
    """What `astra eval` writes of an original and two checkpoints."""
    codes = {G: VQConfig(groups=G).as_dict() for G in (1, 16)}
    coded = [{"checkpoint": f"vit-{G}", "N": 4, "G": G, metric: value, "astra": codes[G]} for G in codes]
    return [{"checkpoint": "vit", "N": 1, "G": None, metric: value, "astra": None}, *coded]


EVALUATED = [
    json.loads(json.dumps({"verb": "eval", "rows": rows(metric, value)}))
    for metric, value in (("accuracy %", 97.5), ("perplexity", 21.5))
]


@fuzz
@given(json_files(*EVALUATED))
def test_accuracies(folder, content):
    path = folder / "eval.json"
    path.write_bytes(content)
    quality = attempt("what eval --json wrote", read_quality, path, None)
    if quality is not REFUSED:
        assert all(type(N) is int and N > 1 and type(G) is int and G > 0 for N, G in quality.reached)
        limits = {"accuracy %": (0, 100), "perplexity": (1, 1e300)}[quality.metric]
        assert all(limits[0] <= value <= limits[1] for value in (quality.original, *quality.reached.values()))
        assert all(math.isfinite(quality.drop(value)) for value in quality.reached.values())


# Requests to a worker

WISHES = Wishes(3, 20, Sampling(0.8, 40, 0.9, 7), ("\n\n",))
PICTURES = Request(("a.png", "b.png"), (b"\x89PNG\r\n\x1a\n", b"GIF89a"), (), WISHES)
REQUESTS = (PICTURES, Request(prompts=("Once upon a time", "é"), wishes=Wishes()))


def heads(request):
    head, _, files = packed(request).partition(b"\n")
    return trees(json.loads(head)).map(lambda tree: written(tree) + b"\n" + files)


@fuzz
@given(st.one_of(*map(heads, REQUESTS), *(byte_strings(packed(request)) for request in REQUESTS)))
def test_requests(content):
    request = attempt("a request to a worker", unpacked, content)
    if request is REFUSED:
        return
    assert len(request.names) == len(request.files)
    texts = (request.names, request.prompts, request.wishes.stop)
    assert all(type(kind) is tuple and all(type(text) is str for text in kind) for kind in texts)
    for name in (*request.names, *request.prompts):
        name.encode()  # a tokenizer cannot read half a character
    wishes, sampling = request.wishes, request.wishes.sampling
    assert type(wishes.top) is int and wishes.top >= 1
    assert wishes.max_new_tokens is None or type(wishes.max_new_tokens) is int
    assert 0 <= sampling.temperature < math.inf and 0 < sampling.top_p <= 1
    assert type(sampling.top_k) is int and sampling.top_k >= 0
    assert type(sampling.seed) is int and 0 <= sampling.seed < 2**32
    assert all(np.isfinite(numbers).all() and (numbers >= 0).all() for numbers in Draws.of([sampling]))
    assert unpacked(packed(request)) == request


# Tables and labels

TABLE = 'text,label\ngood film,1\n"bad, long film",0\nso so,1\n'
TABLES = {
    "csv": TABLE,
    "tsv": 'text\tlabel\ngood film\t1\nbad "long" film\t0\nso so\t1\n',
    "jsonl": "".join(json.dumps({"text": text, "label": n % 2}) + "\n" for n, text in enumerate("abc")),
    "txt": "one document\n<|endoftext|>\nanother one\n",
}


def parquet():
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["good film", "bad film", "so so"], "label": [1, 0, 1]}), file)
    return file.getvalue()


def read_texts(path):
    """All rows of a table as texts with labels."""
    rows = DataArgs(data=str(path), text_column=("text",), label_column="label").open_labelled()
    return [rows[i] for i in range(len(rows))], rows.names


def check_table(folder, kind, content):
    path = folder / f"table.{kind}"
    path.write_bytes(content)
    found = attempt(f"a table as {kind}", read_texts, path)
    if found is not REFUSED:
        rows, names = found
        assert rows and all(row["text"].strip() and 0 <= row["label"] < len(names) for row in rows)


def text_tables(kind):
    text = TABLES[kind]
    return lines(text).map(lambda text: text.encode("utf8", "surrogatepass")) | byte_strings(text.encode())


@fuzz
@given(text_tables("csv"))
def test_csv(folder, content):
    check_table(folder, "csv", content)


@fuzz
@given(text_tables("tsv"))
def test_tsv(folder, content):
    check_table(folder, "tsv", content)


@fuzz
@given(text_tables("jsonl") | trees(*map(json.loads, TABLES["jsonl"].splitlines())).map(written))
def test_jsonl(folder, content):
    check_table(folder, "jsonl", content)


@fuzz
@given(byte_strings(parquet()))
def test_parquet(folder, content):
    check_table(folder, "parquet", content)


def read_split(path, split):
    return list(read(str(path), split, separator="<|endoftext|>").table["text"])


@fuzz
@given(lines("train", "test[:2]", "train[10%:50%]+train[1:2]", "train[-1:]"))
def test_splits(folder, text):
    path = folder / "rows.txt"
    path.write_text("".join(f"{n}\n<|endoftext|>\n" for n in range(8)))
    found = attempt("--split", read_split, path, text)
    if found is not REFUSED:
        assert set(found) <= set(map(str, range(8)))
        slices = re.findall(r"\[.*?\]", text)
        assert all(slice.isascii() and "_" not in slice for slice in slices)


NAMES = ("cat", "dog", "emu", "LABEL_0", "LABEL_1", "0", "1", "10", "Cat", "dog ", "", "٣")


@fuzz
@given(st.lists(st.sampled_from(NAMES), max_size=5), st.lists(st.sampled_from(NAMES), max_size=5))
def test_labels(names, classes):
    found = attempt("labels of data and model", match, names, classes, "data")
    if found is REFUSED:
        return
    indices, how = found
    assert len(indices) == len(names) and how and all(0 <= index < len(classes) for index in indices)
    assert len(set(map(int, indices))) == len(names), "two classes of the data are one of the model"
    for name, index in zip(names, indices, strict=True):
        assert classes[index] == name or name not in classes
