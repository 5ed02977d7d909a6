"""What `make network` makes of what it measured. That workers run in the lab is in tests/lab."""

import checkpoints
from astra_jax.codecs.config import NestedPQConfig
from astra_jax.inputs.images import decode_image
from eval import plots
from eval.reports.network import SLOW, Args, by_rate, computed, lossy, made, picture

ROWS = [
    {"request": n, "rate": SLOW if 2 <= n < 6 else "100mbit", "s": 1.0 + n, "left out": 10 * (2 <= n < 6)}
    for n in range(8)
] + [{"request": None, "rate": "10mbit", "s": s, "left out": 1} for s in (2.0, 4.0, 9.0)]


def test_every_stretch_of_a_rate_is_a_row():
    found = by_rate(ROWS, 8)
    assert [row["rate"] for row in found] == ["100mbit", SLOW, "100mbit", "10mbit"]
    assert [row["requests"] for row in found] == [2, 4, 2, 3]
    assert found[1]["packets left out of each"] == 10 and found[1]["least s"] == 3.0
    assert [row["most, times 10mbit"] for row in found] == [2 / 4, 6 / 4, 8 / 4, 9 / 4]


def test_the_plot_is_drawn(tmp_path):
    plots.changing_rates(ROWS, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_waiting_is_not_computing():
    row = {"total ms": 900.0, "waited ms": 150.0}
    assert computed({"HostTimes": {"rows": [row]}}) == [0.75]


def test_packets_are_counted_for_an_answer():
    rows = [{"sent again": 3, "missing": 0}, {"sent again": 1, "missing": 2}]
    answers = [{"PassTime": {"seconds": s}, "HostTimes": {"rows": rows}} for s in (1.0, 2.0, 6.0)]
    found = lossy(0.05, "wait", answers)
    assert (found["dropped"], found["--late"], found["measured s"]) == ("5%", "wait", 2.0)
    assert (found["sent again"], found["missing"]) == (4, 2)


def test_checkpoint_and_picture_fit_each_other(tiny_vit, tmp_path):
    model = tiny_vit(None, num_channels=3)
    meta = checkpoints.Checkpoint("vit", model.config, None, None, None, {}, "float32", (), model)
    checkpoints.save(tmp_path / "vit", meta)
    args = Args(str(tmp_path / "vit"), None)
    found = checkpoints.load(made(args, None, 4, "nested-pq", tmp_path))
    assert isinstance(found.astra, NestedPQConfig) and found.astra.groups == 4
    path = picture(args, None, tmp_path)
    pixels = found.processor([decode_image(path.read_bytes(), "picture.png")])
    assert pixels.shape == (1, 20, 20, 3)
