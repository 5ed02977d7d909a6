"""Workers under varied requests, with errors between them: they are answered as one process answers them."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from astra_jax.errors import AstraError
from astra_jax.hosts.control import connect
from astra_jax.hosts.invitation import Invitation
from astra_jax.report import Report
from astra_jax.serving.sampling import Sampling
from eval.service import client
from eval.service.requests import Request, Wishes
from eval.service.screen import Screen
from eval.service.service import Service, Setup
from tests.helpers.hosts import workers

HOSTS, REQUESTS = 2, 30  # of each of two models
WRONG_EVERY = 4  # requests, each kind of error in turn
MOST_GROWTH = 30e6  # bytes of memory in the second half of the requests, when all programs are there


def in_turn(number, wrong):
    """The next kind of error, where request `number` (from 1) shall be one."""
    return wrong[number // WRONG_EVERY % len(wrong)] if number % WRONG_EVERY == 0 else None


def text_requests(rng):
    """Prompts of several lengths, drawn in all ways, and what no language model answers."""
    words = lambda least, most: " ".join(f"w{n}" for n in rng.integers(0, 40, rng.integers(least, most)))  # noqa: E731
    yield Request(prompts=("w1 w2 w3",), wishes=Wishes(max_new_tokens=4))
    yield Request(prompts=("w1 w2 w3",), wishes=Wishes(max_new_tokens=4, sampling=Sampling(0.8)))
    yield Request(prompts=("w1 w2 w3",), wishes=Wishes(max_new_tokens=20))
    yield Request(prompts=("w1 w2 w3",))
    yield Request(prompts=("w1 w2 w3",), wishes=Wishes(sampling=Sampling(1.0, top_k=2**32), max_new_tokens=4))
    for number in itertools.count(1):
        temperature = float(rng.choice([0.0, rng.uniform(0.3, 2)]))
        restrictions = (int(rng.integers(0, 60)), float(rng.uniform(0.1, 1))) if rng.random() < 0.5 else ()
        sampling = Sampling(temperature, *restrictions, seed=int(rng.integers(0, 2**32)))
        stop = tuple(f"w{n}" for n in rng.integers(0, 40, rng.integers(0, 3)))
        wishes = Wishes(max_new_tokens=int(rng.integers(1, 20)), sampling=sampling, stop=stop)
        prompts = tuple(words(1, 30) for _ in range(rng.integers(1, 3)))
        wrong = (
            Request(prompts=("",)),
            Request(prompts=(words(64, 90),)),
            Request(prompts=prompts, wishes=Wishes(max_new_tokens=10**30)),
            Request(prompts=prompts, wishes=Wishes(max_new_tokens=0)),
            Request(("a.png",), (b"x",)),
            Request(),
        )
        yield in_turn(number, wrong) or Request(prompts=prompts, wishes=wishes)


def picture_requests(rng):
    """Pictures of several sizes, kinds and formats, and what no ViT answers."""

    def picture():
        shape = tuple(rng.integers(1, 300, 2)) + ((), (3,), (4,))[rng.integers(3)]
        file = io.BytesIO()
        format = "PNG" if shape[2:] == (4,) else str(rng.choice(["PNG", "JPEG", "BMP"]))
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(file, format)
        return file.getvalue()

    for number in itertools.count(1):
        count = int(rng.integers(1, 4))
        names, files = tuple(f"{n} \udce9 [b].png" for n in range(count)), tuple(picture() for _ in range(count))
        wrong = (
            Request(names, (*files[1:], b"none")),
            Request(names, (*files[1:], files[0][: len(files[0]) // 2])),
            Request(prompts=("w1",)),
            Request(names, files, ("w1",)),
            Request(),
        )
        wishes = Wishes(top=int(rng.choice([1, 2, 5, 10**20])))
        yield in_turn(number, wrong) or Request(names, files, wishes=wishes)


def answered(messages, request):
    """What a report has, or the error."""
    report = Report("run")
    screen = Screen(report, request.prompts)
    try:
        for message in messages:
            screen.print(message)
    except AstraError as error:
        return {"error": str(error)}
    return report.data


def send_nonsense(invitation, rng):
    """What `astra run` does not send; and who sends it reads no answer."""
    nonsense = [b"[" * 100_000, b'{"files": [5]}', bytes(rng.integers(0, 256, 999, np.uint8)), b"{}\n"]
    hello = {"role": "client", "digest": ["none", 5, None][rng.integers(3)]}
    connect(invitation, hello, lambda message: None, nonsense[rng.integers(len(nonsense))]).close()


def alone(engine, request):
    """What one process says."""
    yield from engine.answer(request, engine.encode(request))


def memory(process):
    """Bytes of a process that are its own."""
    for row in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if row.startswith("RssAnon"):
            return 1024 * int(row.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "made"), [("llama", text_requests), ("vit", picture_requests)])
def test_varied_requests_are_answered_as_by_one_process(place, capsys, name, made):
    checkpoint, rng = place / name, np.random.default_rng(0)
    requests, engine = made(rng), Service(Setup(checkpoint, devices=str(HOSTS)))
    errors, grown = 0, []
    with workers(checkpoint, hosts=HOSTS) as company:
        invitation, processes = Invitation.read(company.invitation), company.processes
        for number in range(REQUESTS):
            request = next(requests)
            found = answered(client.ask(invitation, checkpoint, request), request)
            expected = answered(alone(engine, request), request)
            assert found.get("error") == expected.get("error"), request
            assert found.get("texts") == expected.get("texts"), request
            assert ("hosts" in found) == ("error" not in found)
            for row, other in zip(found.get("classes", ()), expected.get("classes", ()), strict=True):
                assert (row["input"], row["class"]) == (other["input"], other["class"])
                assert row["probability"] == pytest.approx(other["probability"], rel=1e-4)
            errors += "error" in found
            if number % 10 == 5:
                send_nonsense(invitation, rng)
            if number in (REQUESTS // 2, REQUESTS - 1):
                grown.append([memory(process) for process in processes])
        assert [process.poll() for process in processes] == [None] * HOSTS
    with capsys.disabled():
        print(f"\n{name}: {REQUESTS} requests, {errors} of them errors; memory {grown}")
    assert 6 <= errors <= 9, "each kind of error came, and nothing else failed"
    assert all(late - early < MOST_GROWTH for early, late in zip(*grown, strict=True))
