"""What every test runs under: eight CPU devices, no network, exact matmuls, the same examples every time."""

import importlib.metadata
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also where there is an accelerator, which has not eight devices
# Compiling is most of what tests do: the same program is compiled once, also for the processes that tests start and for
# tests that run beside each other. Whoever reads a program while another writes it is warned by JAX, and compiles it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Half of compiling is to make machine code fast, which tiny programs need not be. The optimized HLO stays the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Two thirds of the rest is saved by compiling a program in one piece, without MLIR where XLA has its older emitters.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import functools
import gc
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import settings

import checkpoints
from astra_jax.codecs.config import AstraConfig
from astra_jax.inputs.token_batches import Text
from astra_jax.models.bert import Bert, BertConfig
from astra_jax.models.clip import CLIPVision, CLIPVisionConfig
from astra_jax.models.deit import DeiT, DeiTConfig
from astra_jax.models.dinov2 import Dinov2, Dinov2WithRegistersConfig
from astra_jax.models.distilbert import DistilBert, DistilBertConfig
from astra_jax.models.gemma import Gemma3Text, Gemma3TextConfig
from astra_jax.models.gpt2 import GPT2, GPT2Config
from astra_jax.models.llama import Llama, LlamaConfig
from astra_jax.models.mpnet import MPNet, MPNetConfig
from astra_jax.models.roberta import Roberta, RobertaConfig
from astra_jax.models.siglip import SiglipVision, SiglipVisionConfig
from astra_jax.models.vit import ViT, ViTConfig
from tests.helpers.models import (
    TINY_BERT,
    TINY_DINOV2,
    TINY_DISTILBERT,
    TINY_GEMMA3,
    TINY_GPT2,
    TINY_LLAMA,
    TINY_MPNET,
    TINY_ROBERTA,
    TINY_VIT,
    draw,
    maker,
)

DEVICES = 8


jax.config.update("jax_num_cpu_devices", DEVICES)  # works only before JAX starts its backend
jax.config.update("jax_default_matmul_precision", "highest")

settings.register_profile("default", deadline=None, max_examples=20, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Traced and compiled programs are very many objects, most of which stay: to look for garbage among them as often as
# Python does by itself takes a fifth of the time of tests.
gc.set_threshold(100_000, 20, 100)

# A script that runs tests in the background has them ignore Ctrl-C, and so would all that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart() -> None:
    """Tests of several devices fail where there is only one; they never skip."""
    found = len(jax.devices("cpu"))
    if found != DEVICES:
        pytest.exit(f"the tests need {DEVICES} CPU devices, JAX has {found}", returncode=1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Processes that share the tests take whole files, as tests of a file share what they load and compile. There is
    one lab at a time: one process takes all of its tests, lest the other one waits."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "lab" if Path(file).parent.name == "lab" else file

    return ByFile(config, log)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not enforced, as for users: what happens to values of a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that does not ask how long a device computes: to measure that is to compile one more program."""
    monkeypatch.setattr("eval.verbs.evaluate.compute_seconds", lambda *_: 1e-3)


@pytest.fixture(scope="session")
def random_module() -> Callable[..., Any]:
    """Makes a module of a class, given the class and its arguments, with random variables."""
    return draw


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., ViT]:
    """Makes a ViT of two blocks and 5x5 patches: no number of devices from 2 to 8 but 5 divides its tokens."""
    return maker(ViT, ViTConfig, TINY_VIT)


@pytest.fixture(scope="session")
def tiny_deit() -> Callable[..., DeiT]:
    """Makes a DeiT of the same size: two class tokens."""
    return maker(DeiT, DeiTConfig, TINY_VIT)


@pytest.fixture(scope="session")
def tiny_dinov2() -> Callable[..., Dinov2]:
    """Makes a DINOv2 of the same size with three registers."""
    return maker(Dinov2, Dinov2WithRegistersConfig, TINY_DINOV2)


@pytest.fixture(scope="session")
def tiny_clip() -> Callable[..., CLIPVision]:
    """Makes a CLIP of the same size."""
    sizes = {name: value for name, value in TINY_VIT.items() if name != "num_labels"}
    return maker(CLIPVision, CLIPVisionConfig, {**sizes, "projection_dim": 6})


@pytest.fixture(scope="session")
def tiny_siglip() -> Callable[..., SiglipVision]:
    """Makes a SigLIP of the same size: no class token, and a head that attends to all patches."""
    return maker(SiglipVision, SiglipVisionConfig, {n: value for n, value in TINY_VIT.items() if n != "num_labels"})


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., GPT2]:
    """Makes a GPT-2 of two blocks that takes up to 64 tokens."""
    return maker(GPT2, GPT2Config, TINY_GPT2)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Llama]:
    """Makes a Llama of two blocks that takes up to 64 tokens; two query heads share a key/value head."""
    return maker(Llama, LlamaConfig, TINY_LLAMA)


@pytest.fixture(scope="session")
def tiny_gemma3() -> Callable[..., Gemma3Text]:
    """Makes a Gemma 3 of two blocks, the first with a window of 5 tokens and a rotary embedding of its own."""
    return maker(Gemma3Text, Gemma3TextConfig, TINY_GEMMA3)


@pytest.fixture(scope="session")
def tiny_bert() -> Callable[..., Bert]:
    """Makes a BERT of two blocks that takes up to 64 tokens and gives embeddings."""
    return maker(Bert, BertConfig, TINY_BERT)


@pytest.fixture(scope="session")
def tiny_distilbert() -> Callable[..., DistilBert]:
    """Makes a DistilBERT of two blocks that takes up to 64 tokens."""
    return maker(DistilBert, DistilBertConfig, TINY_DISTILBERT)


@pytest.fixture(scope="session")
def tiny_mpnet() -> Callable[..., MPNet]:
    """Makes an MPNet of two blocks that takes up to 64 tokens."""
    return maker(MPNet, MPNetConfig, TINY_MPNET)


@pytest.fixture(scope="session")
def tiny_roberta() -> Callable[..., Roberta]:
    """Makes a RoBERTa of two blocks that takes up to 64 tokens."""
    return maker(Roberta, RobertaConfig, TINY_ROBERTA)


@pytest.fixture(scope="session")
def rank_coded() -> Callable[..., jax.Array]:
    """Makes images [B,20,20,1] where every patch of every image has a value of its own: misordering shows."""

    @functools.partial(jax.jit, static_argnums=0)
    def make(B: int) -> jax.Array:
        ranks = jnp.linspace(-2.0, 2.0, B * 25).reshape(B, 5, 5, 1)
        texture = jax.random.normal(jax.random.key(2), (20, 20, 1))
        return ranks.repeat(4, axis=1).repeat(4, axis=2) + 0.3 * texture

    return make


@pytest.fixture(scope="session")
def random_text() -> Callable[..., Text]:
    """Makes token sequences of these lengths, one per length, in T slots. The padding is random, too."""

    def make(*lengths: int, T: int = 24) -> Text:
        ids = np.random.default_rng(1).integers(0, TINY_GPT2["vocab_size"], (len(lengths), T))
        return Text(ids.astype(np.int32), np.asarray(lengths, np.int32))

    return make


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory) -> Callable[..., Path]:
    """Makes the folder of a tokenizer with a token for each of the words w0, w1, ...; with `special` it also puts [CLS]
    before a text and [SEP] behind it, and types to two of them. Its ids are 0 to 3 + `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    def make(words: int, *, special: bool = False) -> Path:
        vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", *(f"w{i}" for i in range(words))]
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        if special:
            inner.post_processor = processors.TemplateProcessing(
                single="[CLS] $A [SEP]",
                pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
            )
        folder = tmp_path_factory.mktemp("tokenizer")
        inner.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        return folder

    return make


@pytest.fixture(scope="session")
def gpt2_saved(tmp_path_factory, tiny_gpt2, word_tokenizer) -> Callable[[AstraConfig | None], Path]:
    """The folder of a tiny GPT-2 with these codes, which is written once, for tests to copy."""

    @functools.cache
    def save(astra: AstraConfig | None) -> Path:
        model, out = tiny_gpt2(astra), tmp_path_factory.mktemp("gpt2") / "saved"
        files = word_tokenizer(model.config.vocab_size - 4)
        saved = checkpoints.Checkpoint("gpt2", model.config, astra, None, None, {}, "float32", (), model, None, files)
        checkpoints.save(out, saved)
        return out

    return save


@pytest.fixture
def gpt2s(tmp_path, gpt2_saved) -> Callable[..., Path]:
    """Puts a tiny GPT-2 under every name with these codes, and a text.txt, into a folder of the test's own."""

    def save(**named: AstraConfig | None) -> Path:
        for name, astra in named.items():
            shutil.copytree(gpt2_saved(astra), tmp_path / name)
        words = np.random.default_rng(0).integers(0, 40, 100)
        (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
        return tmp_path

    return save
