"""The training loop: steps, logging, saving, exact resumption.

One loop trains a plain model (one shard, no codebooks) and finetunes a quantized one (N virtual shards with
Noise-Augmented Quantization). It works on one device or data-parallel over the `data` axis of a mesh.
"""

import dataclasses
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from astra_jax.arguments import Integers
from astra_jax.console import progress
from astra_jax.errors import AstraError
from astra_jax.quantizer import RotatedQuantizer, VectorQuantizer
from astra_jax.sharding import DATA
from astra_jax.strategies import Noise, Single, Virtual, need_codec
from checkpoints.files import quiet, writing
from eval.perplexity import NextTokenLoss


@dataclasses.dataclass(frozen=True)
class Training:
    """How to train. The defaults finetune a quantized model.

    Raises:
      AstraError: a value is outside its range.
    """

    steps: int = 500
    """How many batches to train on."""
    batch_size: int = 64
    """Images or texts per batch, over all devices together."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW, reached after the warm-up; it then falls to zero along a cosine."""
    warmup: float = 0.1
    """Share of the steps that warm up."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on matrices only."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    accumulate: int = 1
    """Batches whose gradients are averaged before one update."""
    trains: Literal["all", "codebooks"] = "all"
    """What is trained: the model and its codebooks, or the codebooks alone (they follow the frozen model by EMA)."""
    shards: Integers = (4,)
    """N: devices to train for; with several, one is drawn for every batch."""
    groups: Integers = ()
    """m: of a rotated-pq codec, how many of its groups are used; of several numbers, one is drawn for every batch. By
    default all, always."""
    noise: float = 1.0
    """lambda of Noise-Augmented Quantization; 0 turns the noise off, 1 is the paper's best."""
    commitment: float = 5e-4
    """beta: weight of the commitment loss."""
    ema_decay: float = 0.99
    """How slowly codebooks and residual statistics follow the data."""
    revive_below: float = 0.02
    """A codeword used less than this share of the mean starts again from a vector of the batch."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in; parameters and statistics stay float32."""
    seed: int = 0
    """Seed of the data order, the noise and the drawn shard counts."""

    def __post_init__(self) -> None:
        ranges = {
            "steps": (1, None),
            "batch_size": (1, None),
            "accumulate": (1, None),
            "learning_rate": (0, None),
            "warmup": (0, 1),
            "clip": (0, None),
            "noise": (0, None),
            "commitment": (0, None),
            "ema_decay": (0, 1),
            "revive_below": (0, 1),
            "label_smoothing": (0, 1),
        }
        for field, (low, high) in ranges.items():
            value = getattr(self, field)
            if value < low or (high is not None and value > high):
                allowed = f"at least {low}" if high is None else f"from {low} to {high}"
                raise AstraError(f"--{field.replace('_', '-')} is {value}; it must be {allowed}")
        if not self.shards or min(self.shards) < 1:
            raise AstraError(f"--shards is {self.shards}; give one or more numbers of devices, such as 4")
        if self.groups and min(self.groups) < 1:
            raise AstraError(f"--groups is {self.groups}; give one or more numbers of groups, such as 1,8,32")


# "input": images [B,h,w,c] or `Text`; "label": classes [B], where the task has any.
Batch = dict[str, Any]


class TrainState(NamedTuple):
    """All that changes from step to step; random keys are functions of the step."""

    params: Any
    codecs: Any
    optimizer: Any
    step: Int[Array, ""]


def optimizer(training: Training) -> optax.GradientTransformation:
    """AdamW behind gradient clipping, warm-up and cosine, and accumulation."""
    decayed = partial(jax.tree_util.tree_map_with_path, lambda path, _: "kernel" in jax.tree_util.keystr(path))
    tx = optax.chain(
        optax.clip_by_global_norm(training.clip),
        optax.adamw(learning_rate(training), weight_decay=training.weight_decay, mask=decayed),
    )
    return optax.MultiSteps(tx, training.accumulate).gradient_transformation() if training.accumulate > 1 else tx


def learning_rate(training: Training) -> optax.Schedule:
    """Update -> learning rate."""
    updates = max(2, -(-training.steps // training.accumulate))
    warmup = min(updates - 1, round(training.warmup * updates))
    return optax.warmup_cosine_decay_schedule(
        training.learning_rate / max(1, warmup), training.learning_rate, warmup, updates
    )


def start(model: Any, training: Training) -> tuple[Any, TrainState]:
    """Splits a model into its graph and the state that training changes."""
    graphdef, params, codecs = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]

    @jax.jit  # one program instead of many small ones
    def fresh(params: Any, codecs: Any) -> TrainState:
        # Copies, because the steps donate their input and the caller keeps the model.
        params, codecs = jax.tree.map(jnp.copy, (params, codecs))
        frozen = training.trains == "codebooks"
        return TrainState(params, codecs, () if frozen else optimizer(training).init(params), jnp.int32(0))

    return graphdef, fresh(params, codecs)


def class_loss(
    logits: Float[Array, "B C"], labels: Int[Array, "B"], smoothing: float
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy with label smoothing, in nats, and accuracy."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
    return optax.softmax_cross_entropy(logits, targets).mean(), {"accuracy": accuracy}


def token_loss(
    losses: Float[Array, "B slots"], lengths: Int[Array, "B"], strategy: Any
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean loss of a token that has a predecessor, in nats, and its exponential, the perplexity."""
    tokens = strategy.tokens()
    counts = tokens.valid & (tokens.position + 1 < lengths[:, None])  # the last token predicts nothing that is known
    mean = jnp.sum(jnp.where(counts, losses, 0.0)) / jnp.maximum(jnp.sum(counts), 1)
    return mean, {"perplexity": jnp.exp(mean)}


def run_task(
    model: Any, batch: Batch, N: int, noise: Noise, smoothing: float
) -> tuple[Float[Array, ""], dict[str, Array], Any]:
    """The loss of a model on N virtual shards, its measures, and the strategy's reports."""
    model = NextTokenLoss(model) if model.per_token else model
    shards = model.shards(N, batch["input"])
    strategy = Virtual(shards, noise) if N > 1 else Single(shards)
    output, seen = model(shards.scatter(model.to_tokens(batch["input"])), strategy)
    if model.per_token:
        return *token_loss(output, batch["input"].lengths, strategy), seen
    return *class_loss(output, batch["label"], smoothing), seen


def make_step(graphdef: Any, training: Training, N: int) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One training step for N shards: (state, batch) -> (state, metrics)."""
    tx, rate = optimizer(training), learning_rate(training)

    def loss(params: Any, codecs: Any, batch: Batch, key: Array) -> tuple[Array, Any]:
        model = nnx.merge(graphdef, params, codecs)
        m = jax.random.choice(jax.random.fold_in(key, 1), jnp.asarray(training.groups)) if training.groups else None
        task, measures, seen = run_task(model, batch, N, Noise(key, training.noise, m), training.label_smoothing)
        commitment = jnp.mean(seen.commitment) if N > 1 else jnp.float32(0)
        total = task + training.commitment * commitment
        error = jnp.mean(seen.error) if N > 1 else jnp.float32(0)
        return total, (dict(loss=total, task=task, commitment=commitment, error=error, **measures), seen)

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        params, codecs, opt_state, number = state
        key = jax.random.fold_in(jax.random.key(training.seed), number)
        arguments = (params, codecs, batch, key)
        if training.trains == "codebooks":
            _, (metrics, seen) = loss(*arguments)
        else:
            (_, (metrics, seen)), grads = jax.value_and_grad(loss, has_aux=True)(*arguments)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        if N > 1:
            model = nnx.merge(graphdef, params, codecs)
            model.codec.follow(seen, training.ema_decay, training.revive_below)
            codecs = nnx.split(model, nnx.Param, ...)[2]  # type: ignore[misc]
        metrics["learning_rate"] = rate(number // training.accumulate)
        return TrainState(params, codecs, opt_state, number + 1), metrics

    return step


def check_groups(codec: VectorQuantizer, groups: tuple[int, ...]) -> None:
    """Raises AstraError for numbers of groups that the codec cannot be used with."""
    if groups and not isinstance(codec, RotatedQuantizer):
        raise AstraError("--groups needs codes of which some groups would do: run `astra calibrate --codec rotated-pq`")
    if groups and max(groups) > codec.groups:
        raise AstraError(f"--groups is {groups}; the checkpoint has {codec.groups}: give no more")


def draw_shards(training: Training, step: int) -> int:
    """N of a step: the same for the same seed and step, whatever came before."""
    return int(np.random.default_rng((training.seed, step)).choice(training.shards))


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C into a question, "was it pressed?", so that a step is finished and saved; a second interrupts."""
    pressed = False

    def handler(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


class Journal:
    """Metrics of every step as JSON lines, beside the checkpoint. A resumed run continues where its state was saved."""

    def __init__(self, path: Path, step: int):
        lines = path.read_text(encoding="utf8").splitlines() if step and path.exists() else []
        # A killed run may have logged steps beyond its last saved state, and half a line.
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf8")
        self.file = path.open("a", encoding="utf8")

    def write(self, values: dict[str, Any]) -> None:
        """Appends one line."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


def train(
    model: Any,
    training: Training,
    data: Any,
    out: Path,
    *,
    mesh: Mesh,
    source: dict[str, Any],
    save_every: int,
    label: str,
) -> tuple[Any, int]:
    """Trains for `training.steps` steps, or resumes what `out` holds of the same training.

    Args:
      model: what to start from; it is left as it is.
      data: an infinite iterator of `Batch` with `get_state` and `set_state`.
      out: folder for `train/` (the saved states) and `train.jsonl`.
      mesh: its data axis splits every batch.
      source: what `model` and `data` come from, for JSON; with the same settings and source a run is resumed.
      save_every: steps between saved states.
      label: of the progress bar.

    Returns:
      the trained model, and how many steps it has had: fewer than asked for after Ctrl-C.

    Raises:
      AstraError: `out` holds a run with other settings, the batch does not divide over the devices, the disk is full,
        or the loss is not finite.
    """
    if training.batch_size % mesh.shape[DATA]:
        raise AstraError(
            f"--batch-size is {training.batch_size}; it must be a multiple of the {mesh.shape[DATA]} devices"
        )
    if max(training.shards) > 1:
        check_groups(need_codec(model.codec), training.groups)
    graphdef, state = start(model, training)
    replicated = NamedSharding(mesh, P())
    state = jax.device_put(state, replicated)
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({**dataclasses.asdict(training), **source}))
    with ocp.CheckpointManager(
        (out / "train").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as manager:
        if manager.latest_step() is not None:
            state = restore(manager, state, data, settings, out)
        done = int(state.step)
        journal = Journal(out / "train.jsonl", done)
        steps = {N: make_step(graphdef, training, N) for N in sorted(set(training.shards))}
        with journal.file, stop_on_interrupt() as stopped, progress(label, training.steps, done) as advance:
            while done < training.steps and not stopped():
                batch = jax.device_put(next(data), NamedSharding(mesh, P(DATA)))
                N = draw_shards(training, done)
                state, metrics = steps[N](state, batch)
                values = {k: float(v) for k, v in metrics.items()}
                if not np.isfinite(values["loss"]):
                    raise AstraError(f"the loss is {values['loss']} at step {done}: try a lower --learning-rate")
                journal.write({"step": done + 1, "shards": N, **values})
                done += 1
                advance(**{k: values[k] for k in ("loss", "accuracy", "perplexity") if k in values})
                if done % save_every == 0 and done < training.steps:
                    save(manager, state, data, settings, out)
            if manager.latest_step() != done:
                save(manager, state, data, settings, out)
    return nnx.merge(graphdef, state.params, state.codecs), done


def save(manager: ocp.CheckpointManager, state: TrainState, data: Any, settings: dict, out: Path) -> None:
    """Saves the state, the position in the data and the settings. Raises AstraError if the disk is full."""
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(_leaves(state)),
        data=ocp.args.JsonSave(data.get_state()),
        settings=ocp.args.JsonSave(settings),
    )
    with writing(out), quiet():
        manager.save(int(state.step), args=items)
        manager.wait_until_finished()


def _leaves(state: TrainState) -> dict[str, Any]:
    """The arrays of a state, numbered: Orbax then needs to know nothing of modules and optimizers."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def restore(manager: ocp.CheckpointManager, state: TrainState, data: Any, settings: dict, out: Path) -> TrainState:
    """The latest saved state; puts `data` back to its position. Raises AstraError if the settings are not the same."""
    saved = manager.restore(
        manager.latest_step(),
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(_leaves(state)), data=ocp.args.JsonRestore(), settings=ocp.args.JsonRestore()
        ),
    )
    # What an earlier version had no setting for was as it is by default.
    before = json.loads(json.dumps(dataclasses.asdict(Training()))) | saved["settings"]
    differing = sorted(k for k in settings if settings[k] != before.get(k))
    if differing:
        values = ", ".join(f"{k} was {before.get(k)}, now {settings[k]}" for k in differing)
        raise AstraError(f"{out} holds a run with other settings ({values}): repeat those, or choose another folder")
    data.set_state(saved["data"])
    return jax.tree.unflatten(jax.tree.structure(state), [saved["state"][k] for k in sorted(saved["state"])])
