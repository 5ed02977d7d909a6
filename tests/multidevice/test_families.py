"""Decoders with windows, norms of queries and keys, and other rotary embeddings on a mesh: ASTRA computes what virtual
shards do, and `sp`, which sends everything, what one device does."""

import itertools
from typing import Any

import numpy as np
import pytest

from astra_jax.codecs.config import VQConfig
from astra_jax.errors import AstraError
from astra_jax.mesh.sharding import make_mesh
from astra_jax.models.gemma import Gemma2, Gemma2Config
from astra_jax.models.mistral import Mistral, MistralConfig
from astra_jax.models.modernbert import ModernBert, ModernBertConfig
from astra_jax.models.olmo2 import Olmo2, Olmo2Config
from astra_jax.models.phi3 import Phi3, Phi3Config
from astra_jax.models.qwen import Qwen2, Qwen2Config, Qwen3, Qwen3Config
from astra_jax.models.rotary import Rotary
from astra_jax.models.smollm3 import SmolLM3, SmolLM3Config
from astra_jax.serving.compile import parallelize
from astra_jax.strategies.coded import Astra
from astra_jax.strategies.rivals import BlockParallel, BlockSequenceParallel, SequenceParallel, TensorParallel
from eval.cost.traffic import messages
from tests.helpers.models import TINY_BERT, TINY_LLAMA, WINDOW, maker
from tests.helpers.sharded import cases, check, real, run_virtual

WINDOWED = {"sliding_window": WINDOW}
MAKERS = {
    "mistral": maker(Mistral, MistralConfig, TINY_LLAMA | WINDOWED),
    "qwen2": maker(Qwen2, Qwen2Config, TINY_LLAMA | WINDOWED | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": maker(Qwen3, Qwen3Config, TINY_LLAMA | {"head_dim": 6}),
    "smollm3": maker(SmolLM3, SmolLM3Config, TINY_LLAMA | {"no_rope_layers": (1, 0)}),
    "phi3": maker(Phi3, Phi3Config, TINY_LLAMA | WINDOWED | {"rope_parameters": Rotary(partial_rotary_factor=0.5)}),
    "olmo2": maker(Olmo2, Olmo2Config, TINY_LLAMA),
    "gemma2": maker(Gemma2, Gemma2Config, TINY_LLAMA | WINDOWED | {"head_dim": 4, "attn_logit_softcapping": 2.0}),
    "modernbert": maker(
        ModernBert,
        ModernBertConfig,
        TINY_BERT | {"local_attention": 2 * WINDOW, "layer_types": ("sliding_attention", "full_attention")},
    ),
}
SITES = ("hidden", "kv")
# Every family meets every number of devices, and both sites. What one device does is in `check_exact`.
ALL = [(name, N, SITES[(n + N) % 2]) for (n, name), N in itertools.product(enumerate(MAKERS), (2, 3, 4, 8))]
FAST = [
    ("mistral", 4, "hidden"),
    ("modernbert", 3, "hidden"),
    ("qwen3", 3, "kv"),
    ("olmo2", 8, "kv"),
    ("gemma2", 2, "hidden"),
]


def made(name: str, site: str) -> Any:
    return MAKERS[name](VQConfig(groups=4, codewords=16, site=site))


@pytest.mark.parametrize(("name", "N", "site"), cases(ALL, FAST))
def test_sharded_equals_virtual(random_text, name, N, site):
    check(made(name, site), random_text(23, 1, 2, 7, 24), N)


def check_exact(model, text, N):
    on_mesh = parallelize(model, make_mesh(N), SequenceParallel.of)(text)
    expected = run_virtual(model, text, 1)
    np.testing.assert_allclose(real(model, text, on_mesh), real(model, text, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", cases([(name,) for name in MAKERS], [("smollm3",), ("gemma2",)]))
def test_what_sends_everything_is_exact(random_text, name):
    check_exact(made(name, "hidden"), random_text(23, 1, 2, 7, 24), 3)


# 24 tokens on 4 devices are 6 each: windows that end before a border, at one, behind it, two shards away, nowhere.
@pytest.mark.parametrize("window", cases([(w,) for w in (1, 2, 6, 7, 8, 12, 13, 23, 24, 40)], [(13,)]))
def test_a_window_that_ends_near_a_border(random_text, window):
    model = MAKERS["mistral"](VQConfig(groups=4, codewords=16), sliding_window=window)
    check_exact(model, random_text(23, 1, 2, 7, 24), 4)
    check(model, random_text(23, 1, 2, 7, 24), 4)


@pytest.mark.parametrize("name", cases([(name,) for name in MAKERS], [("mistral",)]))
def test_every_strategy_sends_what_it_says(random_text, name):
    """And tensor parallelism computes what one device does."""
    model, text = made(name, "hidden"), random_text(23, 7)
    for make in (Astra.of, SequenceParallel.of, BlockParallel.of, BlockSequenceParallel.of):
        assert messages(model, 2, random_text(24), make)  # raises where the program sends something else
    if name != "olmo2":
        assert messages(model, 2, random_text(24), TensorParallel.of)
        on_mesh, expected = parallelize(model, make_mesh(2), TensorParallel.of)(text), run_virtual(model, text, 1)
        np.testing.assert_allclose(real(model, text, on_mesh), real(model, text, expected), rtol=1e-5, atol=1e-5)


def test_tensor_parallelism_needs_heads_whose_norms_are_apart(random_text):
    with pytest.raises(AstraError, match="norms need all of them in this family: use strategy sp"):
        parallelize(MAKERS["olmo2"](), make_mesh(2), TensorParallel.of)(random_text(24))


# Windows of both blocks -> what a device sends in them: a list of (kind, slots); 24 tokens on 4 devices are 6 each.
SENT = {
    (5, 5): [("collective-permute", 4), ("collective-permute", 2), ("collective-permute", 1)],
    (1, 1): [],
    (5, None): [
        *[("collective-permute, sometimes", 4), ("collective-permute, sometimes", 2)],
        *[("collective-permute, sometimes", 1), ("all-gather, sometimes", 6)],
    ],
    (12, 12): [("all-gather", 6)],
}


@pytest.mark.parametrize("windows", cases([(w,) for w in SENT], [((5, None),)]))
def test_codes_go_where_a_query_can_see_them(random_text, windows):
    """Predicted, compiled, and nothing that is not sent is missing."""
    kinds = tuple("sliding_attention" if window else "full_attention" for window in windows)
    options = {"use_sliding_window": True, "sliding_window": windows[0], "layer_types": kinds}
    model = MAKERS["qwen2"](VQConfig(groups=4, codewords=16), **options)
    check(model, random_text(23, 1, 2, 7, 24), 4)
    predicted = messages(model, 4, random_text(24), Astra.of)  # raises where the program sends something else
    found = [(m.kind + ", sometimes" * m.sometimes, m.bits // (4 * 4)) for m in predicted]
    assert found == SENT[windows]
    assert all(m.times == (1 if m.sometimes else 2) for m in predicted)
    if windows == (5, None):
        sent = messages(model, 4, random_text(24), SequenceParallel.of)  # the same of embeddings
        assert [m.bits // (16 * 32) for m in sent] == [slots for _, slots in SENT[windows]]


def test_with_a_predictor_all_hear_all(random_text):
    model = MAKERS["mistral"](VQConfig(groups=4, codewords=16, predictor="linear"))
    (message,) = messages(model, 4, random_text(24), Astra.of)
    assert (message.kind, message.bits) == ("all-gather", 6 * 4 * 4)
    check(model, random_text(23, 1, 24), 4)


@pytest.mark.parametrize("pooling", ["mean", pytest.param("class", marks=pytest.mark.slow)])
@pytest.mark.parametrize("class_token", ["distributed", pytest.param("single", marks=pytest.mark.slow)])
def test_an_encoder_whose_windows_reach_to_both_sides(random_text, pooling, class_token):
    """Of 64 tokens on 4 devices, 5 to each side: the last ones go to the next device, the first to the one before."""
    astra = VQConfig(groups=4, codewords=16, class_token=class_token)
    model = MAKERS["modernbert"](astra, pooling=pooling, layer_types=("sliding_attention",) * 2)
    check(model, random_text(64, 1, 3, 33, 50, T=64), 4)
    found = messages(model, 4, random_text(64, T=64), Astra.of)
    hops = [m.bits // 16 for m in found if m.kind == "collective-permute"]
    assert hops == ([] if pooling == "class" else [5, 5, 2, 3, 1, 2])
