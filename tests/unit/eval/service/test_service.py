"""A loaded checkpoint and its requests. What it answers is in test_verbs*; on several hosts, in tests/multihost."""

import io

import numpy as np
import pytest
from PIL import Image

import checkpoints
from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.report import Report
from eval.service import passes, service
from eval.service.requests import Request, Wishes
from eval.service.screen import Screen
from eval.service.service import Service, Setup


def told(service, request):
    report = Report("run")
    screen = Screen(report, request.prompts)
    for message in service.answer(request, service.encode(request)):
        screen.print(message)
    return report.data


@pytest.mark.slow
def test_programs_of_a_worker_have_a_limit(gpt2s, monkeypatch):
    """Every number of inputs has a program: a worker that stays up for years keeps the last ones."""
    monkeypatch.setattr(passes, "MOST_PROGRAMS", 2)
    folder = gpt2s(small=VQConfig(groups=4, codewords=16))
    small = Service(Setup(folder / "small", devices="2"))
    request = lambda B: Request(prompts=("w1 w2 w3",) * B, wishes=Wishes(max_new_tokens=3))  # noqa: E731
    (first,) = told(small, request(1))["texts"]
    for B in (2, 3, 4, 1, 1):
        found = told(small, request(B))
        assert found["texts"] == [first] * B
        assert len(small.passes._compiled) <= 2
    assert found["compile_seconds"] == 0, "the last one is kept"


def test_pictures_are_decoded_one_after_the_other(tiny_vit, tmp_path, monkeypatch):
    """A thousand that are small as files do not fit into a memory as pictures."""
    model = tiny_vit(None, num_channels=3)
    size = {"height": 20, "width": 20}
    meta = checkpoints.Checkpoint("vit", model.config, None, None, {"size": size}, {}, "float32", (), model)
    checkpoints.save(tmp_path / "vit", meta)
    vit = Service(Setup(tmp_path / "vit"))
    files = []
    for shape in [(40, 30, 3), (7, 9), (20, 20, 4)]:
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    done = []

    def decode(file, name):
        assert len(done) == files.index(file), "the one before is in the model's size already"
        return decode_image(file, name)

    def normalize(processor, pixels):
        done.append(pixels.shape)
        return normalize_pixels(processor, pixels)

    decode_image, normalize_pixels = service.decode_image, type(meta.processor).normalize
    pictures = [decode_image(file, "name") for file in files]
    expected = np.asarray(vit.checkpoint.processor(pictures))
    monkeypatch.setattr(service, "decode_image", decode)
    monkeypatch.setattr(type(meta.processor), "normalize", normalize)
    found = vit.encode(Request(("a", "b", "c"), tuple(files)))
    np.testing.assert_array_equal(found, expected)
    assert done == [(1, 20, 20, 3)] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top": 0}, "--top is 0; it must be at least 1"),
        ({"top": 1.5}, "--top is 1.5"),
        ({"top": True}, "--top is True"),
        ({"max_new_tokens": "5"}, "--max-new-tokens is 5; it must be a whole number"),
        ({"stop": ("a", "")}, "--stop is an empty string"),
        ({"stop": (5,)}, "--stop is 5; it must be a text"),
        ({"stop": ("\ud800",)}, r"--stop: its character 1 is '\ud800', which is none"),
    ],
    ids=str,
)
def test_wishes_out_of_range(unchecked, values, message):
    with pytest.raises(AstraError) as raised:
        Wishes(**values)
    assert message in str(raised.value)
