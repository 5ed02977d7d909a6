"""The verbs on text as a user calls them: the whole way on tiny models, and what wrong input gets."""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import checkpoints
from astra_jax import make_mesh
from astra_jax.cli.main import main
from astra_jax.inputs.token_batches import pad
from astra_jax.models.bert import BertConfig
from astra_jax.models.gpt2 import GPT2Config
from astra_jax.serving.batch import tokens
from astra_jax.serving.generate import Generator
from astra_jax.serving.sampling import Sampling
from checkpoints.huggingface import write_folder
from checkpoints.tensor_maps import build

WORDS = [f"w{i}" for i in range(28)]
GPT2 = GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2)
BERT = BertConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
)
CLASSIFIER = {"task": "classification", "pooling": "class", "num_labels": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory, word_tokenizer) -> Path:
    """Hugging Face folders `gpt2`, `encoder` and `classifier`, and text for each."""
    place = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)

    def write(name: str, family: str, config, labels=None) -> None:
        graphdef, shapes = nnx.split(build(family, config))
        drawn = jax.tree.map(lambda a: jnp.asarray((rng.normal(size=a.shape) / 3).astype(a.dtype)), shapes)
        checkpoint = checkpoints.Checkpoint(
            family=family,
            config=config,
            astra=None,
            labels=labels,
            preprocessing=None,
            hf_config={},
            dtype="float32",
            history=(),
            model=nnx.merge(graphdef, drawn),
            tokenizer_files=word_tokenizer(len(WORDS), special=family == "bert"),
        )
        write_folder(checkpoint, place / name)

    write("gpt2", "gpt2", GPT2)
    write("encoder", "bert", BERT)
    write("classifier", "bert", BertConfig(**{**vars(BERT), **CLASSIFIER}), ("no", "yes"))

    def sentence(length: int) -> str:
        return " ".join(rng.choice(WORDS, length))

    (place / "train.txt").write_text("\n===\n".join(sentence(200) for _ in range(4)))
    rows = "".join(f"{sentence(int(rng.integers(2, 20)))},{label}\n" for label in ["no", "yes"] * 12)
    (place / "train.csv").write_text("text,label\n" + rows)
    return place


def call(place: Path, verb: str, *arguments: object) -> dict:
    """Runs a verb and returns its JSON."""
    report = place / f"{verb}.json"
    assert main([verb, *map(str, arguments), "--json", str(report)]) == 0, verb
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def done(place) -> dict[str, dict]:
    """The whole way of the language model; verb -> its JSON."""
    data = ["--data", place / "train.txt", "--separator", "===", "--length", 16]
    few = ["--groups", 4, "--codewords", 16, "--tokens", 512]
    tuned = place / "tuned"
    return {
        "convert": call(place, "convert", place / "gpt2", place / "original"),
        "calibrate": call(place, "calibrate", place / "original", place / "calibrated", *data, *few),
        "finetune": call(place, "finetune", place / "calibrated", tuned, *data, "--steps", 3, "--batch-size", 8),
        "run": call(place, "run", tuned, "--prompt", "w1 w2 w3 w4 w5 w6 w7 w8 w9", "--devices", 4),
        "info": call(place, "info", tuned),
        "export": call(place, "export", tuned, place / "exported"),
    }


def test_finetune_logs_perplexity(done, place):
    log = [json.loads(line) for line in (place / "tuned" / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3]
    for row in log:
        assert row["perplexity"] == pytest.approx(np.exp(row["task"]), rel=1e-5) and row["commitment"] > 0


def test_run_goes_on_as_the_library_does(done, place):
    """Text, counts and bytes of the verb, from the generator itself."""
    checkpoint = checkpoints.load(place / "tuned")
    ids = checkpoint.tokenizer.encode("w1 w2 w3 w4 w5 w6 w7 w8 w9")
    steps = tokens(Generator(checkpoint.model, make_mesh(4)), pad([ids], 32), 32 + 1 - len(ids), Sampling())
    expected = []
    for step in steps:
        expected.append(int(step[0]))
        if expected[-1] in checkpoint.eos_ids:
            break
    run = done["run"]
    assert run["texts"][0].split() == checkpoint.tokenizer.decode(expected).split()
    assert run["new_tokens"] == [len(expected)] and run["prompt_tokens"] == [len(ids)]
    # The bucket of 32 tokens is 8 on each device: 2 blocks of 8 tokens of 4 groups of 4 bits.
    assert run["code_bytes_per_prompt"] == 2 * 8 * 16 // 8
    # 24 remote slots of 2 blocks: 4 codes of 2 bytes instead of keys and values of 2 x 16 floats.
    assert run["cache_code_bytes"] == 2 * 24 * 4 * 2 and run["cache_full_bytes"] == 2 * 24 * 2 * 16 * 4


def test_the_prompt_is_printed_and_goes_on(done, place, capsys):
    call(place, "run", place / "tuned", "--prompt", "w1 w2", "--max-new-tokens", 3)
    assert re.search(r"^w1 w2 \S+ \S+ \S+\n", capsys.readouterr().out)


def test_several_prompts_are_one_batch_and_a_stop_string_ends_them(done, place, capsys):
    arguments = ["--devices", "2x2", "--max-new-tokens", 8, "--dtype", "float32"]
    prompts = "w1", "w2 w3 w4 w5", "w6"
    free = call(place, "run", place / "original", "--prompt", *prompts, *arguments[2:])
    alone = call(place, "run", place / "original", "--prompt", "w2 w3 w4 w5", *arguments[2:])
    assert free["texts"][1] == alone["texts"][0]
    stop = free["texts"][1].split()[3]
    stopped = call(place, "run", place / "original", "--prompt", *prompts, *arguments[2:], "--stop", stop)
    assert stopped["texts"][1] == free["texts"][1][: free["texts"][1].index(stop)]
    spread = call(place, "run", place / "calibrated", "--prompt", *prompts, *arguments)
    assert spread["new_tokens"] and "uses 1 of the 2 devices" in capsys.readouterr().out


def test_sampling_follows_the_seed(done, place):
    arguments = [place / "original", "--prompt", "w1 w2", "--max-new-tokens", 12, "--temperature", 1.5, "--top-k", 20]
    a, b, c = (call(place, "run", *arguments, "--seed", seed)["texts"] for seed in (1, 1, 2))
    assert a == b != c


def test_export_gives_back_the_tokenizer(done, place):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (place / "exported" / file).read_bytes() == (place / "gpt2" / file).read_bytes()
    assert load_file(place / "exported" / "model.safetensors").keys() == (
        load_file(place / "gpt2" / "model.safetensors").keys()
    )


@pytest.mark.slow
def test_a_classifier_of_text(place):
    data = ["--data", place / "train.csv"]
    call(place, "convert", place / "classifier", place / "c")
    few = ["--groups", 4, "--codewords", 16, "--tokens", 128]
    call(place, "calibrate", place / "c", place / "c-calibrated", *data, "--text-column", "text", *few)
    call(place, "finetune", place / "c-calibrated", place / "c-tuned", *data, "--label-column", "label", "--steps", 2)
    log = [json.loads(line) for line in (place / "c-tuned" / "train.jsonl").read_text().splitlines()]
    assert 0 <= log[-1]["accuracy"] <= 1
    rows = call(place, "run", place / "c-tuned", "--prompt", "w1 w2 w3 w4 w5", "w9", "--devices", 2)["classes"]
    assert len(rows) == 4 and {row["class"] for row in rows} == {"no", "yes"}


def test_a_sentence_encoder(place, capsys):
    data = ["--data", place / "train.csv", "--text-column", "text"]
    call(place, "convert", place / "encoder", place / "e")
    call(place, "calibrate", place / "e", place / "e-codes", *data, "--groups", 2, "--codewords", 16)
    rows = call(place, "run", place / "e-codes", "--prompt", "w1 w2 w3", "w1 w2 w3", "w8", "--devices", 2)
    cosines = [row["cosine"] for row in rows["similarities"]]
    assert cosines[0] == pytest.approx(1, abs=1e-5) and max(cosines[1:]) < 0.9999
    assert main(["run", str(place / "e-codes"), "--prompt", "w1"]) == 2
    assert "two or more texts" in capsys.readouterr().err
    assert main(["finetune", str(place / "e-codes"), str(place / "e-tuned"), *map(str, data)]) == 2
    assert "has no classifier, so there is no loss for it" in capsys.readouterr().err


BAD = {
    "no prompt": ("run {place}/original", "give --prompt, not --image"),
    "a picture for a language model": ("run {place}/original --image {place}/original/astra.json", "give --prompt"),
    "a pair for a language model": (
        "run {place}/original --prompt w1 --pair w2",
        "--pair is for classifiers, and this",
    ),
    "a pair of one": ("run {place}/original --prompt w1 w2 --pair w2", "2 texts with --prompt and 1 with --pair"),
    "an empty prompt": ("run {place}/original --prompt=", "the text is empty"),
    "a prompt that is too long": ("run {place}/original --prompt {long}", "40 tokens; the model takes at most 32"),
    "more new tokens than the model has room for": (
        "run {place}/original --prompt w1 --max-new-tokens 33",
        "a prompt of 1 and 33 new tokens are more than the model takes, 32",
    ),
    "a temperature below 0": ("run {place}/original --prompt w1 --temperature -1", "try 0.8"),
    "top-p of 0": ("run {place}/original --prompt w1 --top-p 0", "top-p is 0"),
    "an empty stop string": ("run {place}/original --prompt w1 --stop=", "stop is an empty string"),
    "no codebooks to run with": ("run {place}/original --prompt w1 --devices 2", "astra calibrate"),
    "no tokenizer": ("run {place}/bare --prompt w1", "tokenizer"),
    "sequences longer than the model": (
        "finetune {place}/calibrated {place}/new --data {place}/train.txt --length 33",
        "this model takes from 2 to 32 tokens",
    ),
    "too little text": (
        "calibrate {place}/original {place}/new --data {place}/short.txt --groups 4",
        "fewer than one sequence",
    ),
    "no such text": ("calibrate {place}/original {place}/new --data {place}/nowhere.txt --groups 4", "nowhere.txt"),
    "a tokenizer of another model": ("convert {place}/vocabulary {place}/new", "tokenizer has ids up to 31.*is 20"),
    "weights that are no numbers": ("convert {place}/nan {place}/new", "1 NaN or infinite: transformer.wte.weight"),
    "an unknown activation": ("convert {place}/act {place}/new", "config.json.*activation_function is 'swoosh'"),
    "attention that is not computed": ("convert {place}/scaled {place}/new", "scale_attn_by_inverse_layer_idx"),
}


@pytest.fixture(scope="module")
def damaged(done, place) -> Path:
    """Folders that something is wrong with."""
    for name, changes in {
        "vocabulary": {"vocab_size": 20},
        "act": {"activation_function": "swoosh"},
        "scaled": {"scale_attn_by_inverse_layer_idx": True},
        "nan": {},
    }.items():
        shutil.copytree(place / "gpt2", place / name)
        config = json.loads((place / name / "config.json").read_text())
        (place / name / "config.json").write_text(json.dumps(config | changes))
    for name, change in {"nan": lambda a: np.full_like(a, np.nan), "vocabulary": lambda a: a[:20]}.items():
        tensors = load_file(place / name / "model.safetensors")
        tensors["transformer.wte.weight"] = np.ascontiguousarray(change(tensors["transformer.wte.weight"]))
        save_file(tensors, place / name / "model.safetensors")
    (place / "short.txt").write_text("w1 w2")
    shutil.copytree(place / "original", place / "bare")
    shutil.rmtree(place / "bare" / "tokenizer-0001")
    return place


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case, damaged, capsys):
    line, expected = BAD[case]
    before = sorted(os.listdir(damaged))
    capsys.readouterr()
    arguments = [a.format(place=damaged, long=" ".join(["w1"] * 40)) for a in line.split()]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("astra: error: ") and re.search(expected, lines[0]), lines
    assert sorted(os.listdir(damaged)) == before  # nothing half-written
