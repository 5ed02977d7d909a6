"""Mutations of what `checkpoints` reads: Hugging Face folders, astra.json, and the stored parts of weights."""

import copy
import dataclasses
import json
import shutil
import struct
import typing
from functools import partial

import numpy as np
import pytest
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import checkpoints
from astra_jax.codecs.config import NestedPQConfig, VQConfig
from astra_jax.inputs.images import ImageProcessor
from astra_jax.mesh.sharding import Pooling
from astra_jax.models.rotary import Rotary
from checkpoints import configs, description, huggingface, tensor_maps, weights
from checkpoints.files import read_json
from checkpoints.parts import part_of
from tests.fuzz.harness import REFUSED, attempt, fuzz
from tests.fuzz.mutations import byte_strings, json_files, trees, written
from tests.helpers.models import TINY_BERT, TINY_DINOV2, TINY_GPT2, TINY_LLAMA, TINY_VIT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# config.json

LABELS = {"id2label": {"0": "bad", "1": "good", "2": "so so"}, "label2id": {"bad": 0, "good": 1, "so so": 2}}
VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **TINY_VIT, **LABELS}
del VIT["num_labels"]
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **TINY_GPT2}
BERT = {"model_type": "bert", "architectures": ["BertModel"], **TINY_BERT}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TINY_LLAMA, "rope_theta": 5e5}
DINOV2 = {"model_type": "dinov2_with_registers", "architectures": ["Dinov2WithRegistersModel"], **TINY_DINOV2}
del DINOV2["num_labels"]
CLIP = {
    "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 8, "text_config": {"vocab_size": 40},
    "vision_config": {name: value for name, value in TINY_VIT.items() if name != "num_labels"},
}  # fmt: skip
ROPES = (
    {"rope_type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
)  # fmt: skip
FAMILIES = {
    "vit": [VIT, VIT | {"hidden_act": "gelu_new", "qkv_bias": False, "image_size": [20, 20], "layer_norm_eps": 1e-6}],
    "dinov2_with_registers": [
        DINOV2,
        DINOV2 | {"architectures": ["Dinov2WithRegistersForImageClassification"], **LABELS, "image_size": 32},
    ],
    "clip_vision_model": [CLIP, CLIP | {"vision_config_dict": {"hidden_size": 24, "hidden_act": "gelu"}}],
    "gpt2": [GPT2, GPT2 | {"architectures": ["GPT2ForSequenceClassification"], **LABELS, "pad_token_id": 0}],
    "bert": [BERT, BERT | {"architectures": ["BertForSequenceClassification"], **LABELS}],
    "llama": [LLAMA, *(LLAMA | {field: rope} for rope in ROPES for field in ("rope_scaling", "rope_parameters"))],
}
# Fields that a file may have besides.
KNOWN = {
    "vit": {
        "layer_norm_eps": 1e-6, "num_labels": 7, "encoder_stride": 16, "pooler_output_size": 8, "hidden_act": "relu",
    },
    "dinov2_with_registers": {
        "use_swiglu_ffn": True, "mlp_ratio": 3, "layerscale_value": 0.1, "qkv_bias": False, "layer_norm_eps": 1e-5,
        "out_features": ["stem"], "drop_path_rate": 0.1, "hidden_act": "relu", "use_mask_token": False,
    },
    "clip_vision_model": {
        "dropout": 0.0, "projection_dim": 12, "layer_norm_eps": 1e-6, "num_channels": 1, "initializer_factor": 1.0,
        "hidden_act": "quick_gelu", "logit_scale_init_value": 2.6, "vision_config_dict": None,
    },
    "gpt2": {
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        "reorder_and_upcast_attn": False, "num_attention_heads": 4, "hidden_size": 32, "n_ctx": 64,
        "tie_word_embeddings": True, "eos_token_id": 5, "problem_type": "single_label_classification",
        "max_position_embeddings": 32, "num_hidden_layers": 3, "activation_function": "relu",
    },
    "bert": {
        "position_embedding_type": "absolute", "is_decoder": False, "chunk_size_feed_forward": 0, "hidden_act": "relu",
        "problem_type": "multi_label_classification", "num_labels": 1, "layer_norm_eps": 1e-5, "pruned_heads": {},
    },
    "llama": {
        "rope_scaling": ROPES[2], "rope_parameters": ROPES[3], "original_max_position_embeddings": 16, "head_dim": 4,
        "rope_type": "linear", "partial_rotary_factor": 0.5, "attention_factor": 1.1, "beta_fast": 16, "mscale": 1.0,
        "mscale_all_dim": 0.5, "truncate": False, "attention_bias": True, "tie_word_embeddings": True,
        "pretraining_tp": 2, "sliding_window": 4, "rms_norm_eps": 1e-5, "hidden_act": "gelu", "factor": 3.0,
    },
}  # fmt: skip


def read_config(folder):
    """Family, configuration and labels of the config.json in a folder."""
    content = read_json(folder / configs.CONFIG)
    content = part_of(content, folder / configs.CONFIG) or content
    family, architecture = configs.architecture_in(content, folder)
    head = tensor_maps.FAMILIES[family].architectures[architecture]
    derived = configs.derived_fields(family, head, ["pooler.dense.weight"], folder)
    return family, content, *configs.config_from_hf(family, content, folder, derived)


NONE_IS_0 = ("pad_token_id", "original_max_position_embeddings", "mscale", "mscale_all_dim")


def in_range(config):
    """Whether all numbers of a configuration make sense by themselves."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            assert "bool" in str(field.type), field.name
        elif "eps" in field.name:
            assert 0 <= value <= 1, field.name
        elif isinstance(value, int) and field.name != "type_vocab_size":
            assert 0 < value < 2**31 or (value == 0 and field.name in NONE_IS_0), field.name
        elif isinstance(value, float):
            assert 0 <= value <= 1e15, field.name
        elif dataclasses.is_dataclass(value):
            in_range(value)


def frequencies(config):
    """What transformers computes of a configuration: frequencies, and what queries and keys are scaled with."""
    if config.rope_parameters["rope_type"] == "default":
        E = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"]
        return 1.0 / theta ** (np.arange(0, E, 2, dtype=np.float32) / E), 1.0
    found, scale = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
    return found.numpy(), scale


def as_in_transformers(family, content, config):
    """Whether transformers reads the same values from a config.json, or refuses it for a field that is not used."""
    if isinstance(content.get("num_labels"), int) and content["num_labels"] > 10**5:  # it would name each of them
        return
    try:
        theirs = transformers.CONFIG_MAPPING[family].from_dict(copy.deepcopy(content))
    except StrictDataclassFieldValidationError as error:
        field = str(error).split("'")[1]
        assert field not in {field.name for field in dataclasses.fields(config)}, f"transformers says {error}"
        return
    for field in dataclasses.fields(config):
        ours = getattr(config, field.name)
        if isinstance(ours, Rotary):
            if config.E < 10_000 and None not in theirs.rope_parameters.values():  # of which it computes nothing
                found, scale = frequencies(theirs)
                np.testing.assert_allclose(ours.frequencies(config.E), found, rtol=1e-5)
                np.testing.assert_allclose(ours.scale, scale, rtol=1e-5)
        elif field.name not in configs.DERIVED and field.name != "num_labels":
            value = getattr(theirs, field.name)
            value = value[0] if isinstance(value, list | tuple) else value
            assert ours == value or (ours is None), f"{field.name} is {ours!r}, and {value!r} in transformers"
    if tensor_maps.classifies(config):
        assert config.num_labels == theirs.num_labels, "num_labels"


def check_config(family, folder, content):
    (folder / configs.CONFIG).write_bytes(content)
    found = attempt(f"config.json of {family}", read_config, folder)
    if found is REFUSED:
        return
    family, content, config, labels = found
    in_range(config)
    assert labels is None or all(type(label) is str for label in labels)
    as_in_transformers(family, content, config)


@fuzz
@given(json_files(*FAMILIES["vit"], known=KNOWN["vit"]))
def test_config_of_vit(folder, content):
    check_config("vit", folder, content)


@fuzz
@given(json_files(*FAMILIES["dinov2_with_registers"], known=KNOWN["dinov2_with_registers"]))
def test_config_of_dinov2(folder, content):
    check_config("dinov2_with_registers", folder, content)


@fuzz
@given(json_files(*FAMILIES["clip_vision_model"], known=KNOWN["clip_vision_model"]))
def test_config_of_clip(folder, content):
    check_config("clip_vision_model", folder, content)


@fuzz
@given(json_files(*FAMILIES["gpt2"], known=KNOWN["gpt2"]))
def test_config_of_gpt2(folder, content):
    check_config("gpt2", folder, content)


@fuzz
@given(json_files(*FAMILIES["bert"], known=KNOWN["bert"]))
def test_config_of_bert(folder, content):
    check_config("bert", folder, content)


@fuzz
@given(json_files(*FAMILIES["llama"], known=KNOWN["llama"]))
def test_config_of_llama(folder, content):
    check_config("llama", folder, content)


# What sentence-transformers and generation add

MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")))
]
POOLING = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
SENTENCES = {"max_seq_length": 32, "do_lower_case": False}
ADDED = {
    "modules.json": (MODULES, {}),
    "1_Pooling/config.json": (
        POOLING,
        {"pooling_mode": "mean", "pooling_mode_lasttoken": True, "include_prompt": True},
    ),
    "sentence_bert_config.json": (SENTENCES, {"model_args": {}}),
}


def read_embedding(folder):
    head = tensor_maps.FAMILIES["bert"].architectures["BertModel"]
    derived = configs.derived_fields("bert", head, [], folder)
    return configs.config_from_hf("bert", BERT, folder, derived)[0]


@fuzz
@given(
    st.sampled_from(sorted(ADDED)).flatmap(
        lambda name: st.tuples(st.just(name), json_files(ADDED[name][0], known=ADDED[name][1]))
    )
)
def test_sentence_transformers(folder, mutant):
    here = folder / "sentences"
    (here / "1_Pooling").mkdir(parents=True, exist_ok=True)
    for name, (content, _) in ADDED.items():
        (here / name).write_bytes(written(content))
    (here / mutant[0]).write_bytes(mutant[1])
    found = attempt("files of sentence-transformers", read_embedding, here)
    if found is not REFUSED:
        in_range(found)
        assert found.pooling in typing.get_args(Pooling) and type(found.normalize) is bool


def ends_of(path):
    """The end-of-text tokens that a generation_config.json says."""
    checkpoint = checkpoints.Checkpoint(
        "gpt2", None, None, None, None, {"eos_token_id": 7}, "float32", (), None, read_json(path), None
    )
    return checkpoint.eos_ids


@fuzz
@given(json_files({"eos_token_id": 2, "bos_token_id": 1}, {"eos_token_id": [2, 3], "max_length": 20}))
def test_generation_config(folder, content):
    path = folder / "generation_config.json"
    path.write_bytes(content)
    ids = attempt("generation_config.json", ends_of, path)
    if ids is not REFUSED:
        said = json.loads(content).get("eos_token_id")
        said = 7 if said is None else said
        assert list(ids) == (said if isinstance(said, list) else [said])
        assert all(type(token) is int and -1 <= token < 2**31 for token in ids)


# Weights of a Hugging Face folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Hugging Face folder of a tiny Llama, and its tensors."""
    here = tmp_path_factory.mktemp("llama")
    (here / "config.json").write_bytes(written(LLAMA))
    config, _ = configs.config_from_hf("llama", LLAMA, here)
    sizes, rng = tensor_maps.FAMILIES["llama"].sizes(config), np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=key.shape(sizes)).astype(np.float32)
        for name, (key, _) in tensor_maps.model_tensors("llama", tensor_maps.build("llama", config)).items()
    }
    return here, tensors


def read_folder(folder):
    opened = huggingface.open_folder(str(folder))
    return opened, dict(opened.parts())


def check_weights(opened, parts):
    shapes = tensor_maps.flat_state(opened.checkpoint.model)
    for name, arrays in parts.items():
        for path, array in arrays.items():
            assert np.isfinite(array).all() and array.dtype == opened.checkpoint.dtype
            assert array.shape == (shapes[path].shape[1:] if name.startswith("block-") else shapes[path].shape)


@st.composite
def safetensors(draw, tensors):
    """A safetensors file whose header is mutated as JSON, or whose bytes are."""
    content = save(tensors, {"format": "pt"})
    if draw(st.booleans()):
        return draw(byte_strings(content[: 1 << 12])) + content[1 << 12 :]
    length = struct.unpack("<Q", content[:8])[0]
    header = draw(trees(json.loads(content[8 : 8 + length])).map(written))
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


@fuzz
@given(st.data())
def test_safetensors(llama, data):
    here, tensors = llama
    (here / "model.safetensors").write_bytes(data.draw(safetensors(tensors)))
    found = attempt("a safetensors file", read_folder, here)
    if found is not REFUSED:
        check_weights(*found)


@fuzz
@given(json_files(*FAMILIES["llama"], known=KNOWN["llama"]))
def test_config_and_weights(llama, content):
    """That a configuration can be read is not all: a model is made of it, and weights have to fit."""
    here, tensors = llama
    (here / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    (here / "config.json").write_bytes(content)
    found = attempt("config.json of weights", read_folder, here)
    (here / "config.json").write_bytes(written(LLAMA))
    if found is not REFUSED:
        check_weights(*found)


INDEX = {
    "metadata": {"total_size": 100},
    "weight_map": {"lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"},
}


@fuzz
@given(json_files(INDEX))
def test_index(folder, content):
    here = folder / "index"
    here.mkdir(exist_ok=True)
    for name in ("a.safetensors", "b.safetensors"):
        (here / name).write_bytes(b"")
    (here / "model.safetensors.index.json").write_bytes(content)
    files = attempt("model.safetensors.index.json", huggingface.tensor_files, here)
    if files is not REFUSED:
        assert files and all(file.parent == here and file.suffix == ".safetensors" and file.is_file() for file in files)


# Our own checkpoints

ROTATED = NestedPQConfig(groups=2, codewords=8, widths=(2, 3), levels=(1, 1), predictor="linear")


@pytest.fixture(scope="module")
def stored(tmp_path_factory, llama):
    """A checkpoint of the tiny Llama."""
    from checkpoints.streaming import assemble

    here, tensors = llama
    (here / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    opened = huggingface.open_folder(str(here))
    model = assemble(opened.checkpoint.model, opened.parts())
    out = tmp_path_factory.mktemp("stored") / "llama"
    checkpoints.save(out, dataclasses.replace(opened.checkpoint, model=model, generation={"eos_token_id": 2}))
    return out


def metas(path):
    """Contents of astra.json: with and without codes, of pictures and of text."""
    text = json.loads((path / description.META).read_text())
    labels = {
        "family": "vit",
        "labels": ["a", "b", "c", "d", "e"],
        "preprocessing": ImageProcessor(size=(20, 20)).to_hf(),
    }
    config = dataclasses.asdict(tensor_maps.config_class("vit")(**TINY_VIT))
    codes = [astra.as_dict() for astra in (ROTATED, VQConfig(groups=2, codewords=8, site="kv"))]
    picture = text | labels | {"config": config, "hf_config": VIT, "generation": None}
    return [json.loads(json.dumps(m)) for m in (text, picture, *({**picture, "astra": code} for code in codes))]


@fuzz
@given(st.data())
def test_astra_json(stored, folder, data):
    here = folder / "checkpoint"
    here.mkdir(exist_ok=True)
    documents = metas(stored)
    sealed = trees(*documents).map(lambda tree: written(description.sealed(tree) if isinstance(tree, dict) else tree))
    (here / description.META).write_bytes(
        data.draw(json_files(*documents, known={"format": description.FORMAT}) | sealed)
    )
    found = attempt("astra.json", checkpoints.read_meta, here)
    if found is REFUSED:
        return
    in_range(found.config)
    if found.astra:
        in_range(found.astra)
        assert all(
            type(n) is int and n > 0 for n in (*getattr(found.astra, "widths", ()), *getattr(found.astra, "levels", ()))
        )
    assert found.dtype in huggingface.DTYPES.values() and found.family in tensor_maps.FAMILIES
    assert found.labels is None or all(type(label) is str for label in found.labels)
    if found.labels is not None and tensor_maps.classifies(found.config):
        assert len(found.labels) == found.config.num_labels
    assert all(type(step) is dict for step in found.history)


def read_parts(stored, model):
    return dict(weights.read_parts(stored, model))


@pytest.fixture(scope="module")
def parts(stored):
    """The weights as they are stored, a copy of their folder, the model that they are of, and what is read of them."""
    checkpoint, undamaged = description.read_description(stored)
    here = shutil.copytree(undamaged.weights, stored.parent / "damaged")
    model = tensor_maps.build("llama", checkpoint.config)
    return undamaged._replace(weights=here), model, read_parts(undamaged, model)


@partial(fuzz, share=3)  # each reads all parts
@given(st.data())
def test_parts(parts, data):
    """A file of one part of the weights is mutated, and sometimes is gone; the others are as they were."""
    known, model, expected = parts
    here = known.weights
    if data.draw(st.booleans()):  # without comparing digests
        known = known._replace(parts=None)
    files = sorted(path for path in here.rglob("*") if path.is_file())
    place = data.draw(st.sampled_from(files))
    content = place.read_bytes()
    try:
        document = json.loads(content)
    except ValueError:
        document = None
    mutants = byte_strings(content)
    if isinstance(document, dict):
        mutants |= json_files(document)
    mutant = data.draw(mutants | st.none())
    if mutant is None:
        place.unlink()
    else:
        place.write_bytes(mutant)
    try:
        found = attempt("parts of stored weights", read_parts, known, model)
    finally:
        place.write_bytes(content)
    if found is not REFUSED:
        assert found.keys() == expected.keys()
        for name, arrays in expected.items():
            for path, array in arrays.items():
                assert found[name][path].shape == array.shape and found[name][path].dtype == array.dtype
                assert known.parts is None or np.array_equal(found[name][path], array), "a damaged weight"
