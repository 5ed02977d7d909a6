"""The training loop: steps, logging, saving, exact resumption.

One loop trains a plain model (one shard, no codebooks) and finetunes a quantized one (N virtual shards with
Noise-Augmented Quantization). It works on one device, or on several that share batches and large arrays.
"""

import dataclasses
import json
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Bool, Int, Key

from astra_jax.cli.arguments import Integers
from astra_jax.codecs.base import BY_GRADIENT, Quantizer
from astra_jax.errors import AstraError
from astra_jax.files import in_utf8
from astra_jax.mesh.sharding import Shards
from astra_jax.report import progress
from astra_jax.strategies.base import Single
from astra_jax.strategies.coded import Astra, need_codec
from checkpoints.lock import alone
from eval.network.packet_loss import PacketLoss, arrived
from train.memory import ONE_DEVICE, FrugalSingle, Memory
from train.navq import NoiseAugmented
from train.objective import Batch, run_task
from train.state import LOCK, Journal, TrainState, first_batch, occupied, restore, save


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
    trains: Literal["all", "lora", "codebooks"] = "all"
    """What is trained: the model and its codebooks; adapters beside its frozen weights, and the codebooks; or the
    codebooks alone (they follow the frozen model by EMA)."""
    shards: Integers = (4,)
    """N: devices to train for; with several, one is drawn for every batch."""
    groups: Integers = ()
    """m: of a nested-pq codec, how many of its groups are used; of several numbers, one is drawn for every batch. By
    default all, always."""
    cuts: Literal["even", "random"] = "even"
    """Where a sequence is cut into shards: as evenly as can be, or in every batch each sequence at random, so that a
    shard gets from one token to twice its even share. That costs computing, because all are padded to the latter."""
    packet_loss: float = 0.0
    """Largest share of lost packets, of 1400 bytes, each lost on its own. The host draws for every batch a share from 0
    to this, and what is lost."""
    noise: float = 1.0
    """lambda of Noise-Augmented Quantization; 0 turns the noise off, 1 is the paper's best."""
    commitment: float = 5e-4
    """beta: weight of the commitment loss, and of what a predictor does not expect."""
    distillation: float = 0.0
    """a: weight of the KL divergence of what the model says from what a teacher does: the model as it was when training
    began, on one device, without codes. With a teacher every batch costs one more forward pass."""
    hidden: float = 0.0
    """b: weight of how far final states are from the teacher's: the mean square of the difference over theirs."""
    ema_decay: float = 0.99
    """How slowly codebooks and residual statistics follow the data."""
    revive_below: float = 0.02
    """A codeword used less than this share of the mean starts again from a vector of the batch."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in. What is trained stays float32."""
    seed: int = 0
    """Seed of the data order, the noise, and of all that is drawn for a batch."""

    def __post_init__(self) -> None:
        ranges = {
            "steps": (1, None),
            "batch_size": (1, None),
            "accumulate": (1, None),
            "learning_rate": (0, None),
            "warmup": (0, 1),
            "weight_decay": (0, None),
            "clip": (0, None),
            "noise": (0, None),
            "commitment": (0, None),
            "distillation": (0, None),
            "hidden": (0, None),
            "packet_loss": (0, 1),
            "ema_decay": (0, 1),
            "revive_below": (0, 1),
            "label_smoothing": (0, 1),
        }
        for field, (low, high) in ranges.items():
            value = getattr(self, field)
            if not value >= low or (high is not None and value > high):  # also what is not a number
                allowed = f"at least {low}" if high is None else f"from {low} to {high}"
                raise AstraError(f"--{field.replace('_', '-')} is {value}; it must be {allowed}")
        if not self.shards or min(self.shards) < 1:
            raise AstraError(f"--shards is {self.shards}; give one or more numbers of devices, such as 4")
        if self.groups and min(self.groups) < 1:
            raise AstraError(f"--groups is {self.groups}; give one or more numbers of groups, such as 1,8,32")
        if self.has_teacher and self.trains == "codebooks":
            raise AstraError("--trains codebooks learns from no teacher: leave out --distillation and --hidden")

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is run."""
        return self.distillation > 0 or self.hidden > 0


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


def divide(model: Any, training: Training) -> tuple[Any, Any, Any, Any]:
    """A model's graph, the parameters that are trained, those that stay as they are, and its codecs."""
    of_codecs = nnx.All(BY_GRADIENT, nnx.Not(nnx.Param))
    trained = {"all": BY_GRADIENT, "lora": nnx.Any(nnx.LoRAParam, of_codecs), "codebooks": nnx.Nothing()}
    return nnx.split(model, trained[training.trains], BY_GRADIENT, ...)  # type: ignore[call-overload]


def first_state(training: Training, params: Any, codecs: Any) -> TrainState:
    """What training begins with."""
    return TrainState(params, codecs, optimizer(training).init(params), jnp.int32(0))


def start(model: Any, training: Training, memory: Memory = ONE_DEVICE) -> tuple[Any, Any, TrainState]:
    """A model's graph, what training leaves as it is, and the state that it changes, the latter two on the devices.

    `nnx.merge(graphdef, state.params, frozen, state.codecs)` is the model.
    """
    graphdef, params, frozen, codecs = divide(model, training)

    @jax.jit  # one program instead of many small ones
    def fresh(params: Any, codecs: Any) -> TrainState:
        # Copies, because the steps donate their input and the caller keeps the model.
        return memory.spread(first_state(training, *jax.tree.map(jnp.copy, (params, codecs))))

    return graphdef, memory.spread(frozen), fresh(*memory.spread((params, codecs)))


def make_step(
    graphdef: Any, training: Training, N: int, memory: Memory = ONE_DEVICE
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One training step for N shards: (state, frozen parameters, batch, the teacher's parameters, if there is one) ->
    (state, metrics). The state is donated."""
    tx, rate = optimizer(training), learning_rate(training)

    def loss(params: Any, frozen: Any, codecs: Any, batch: Batch, key: Array, teacher: Any) -> tuple[Array, Any]:
        params, frozen, codecs, teacher = memory.whole((params, frozen, codecs, teacher), but_blocks=True)
        model = nnx.merge(graphdef, params, frozen, codecs)
        strategy = strategy_of(model, training, N, batch, key, memory)
        of_teacher = None if teacher is None else nnx.merge(graphdef, teacher, frozen, codecs)
        task, measures, seen = run_task(model, batch, strategy, training.label_smoothing, of_teacher)
        commitment = jnp.mean(seen.commitment) if N > 1 else jnp.float32(0)
        total = task + training.commitment * commitment
        if N > 1 and model.codec.remembers:
            surprise = jnp.mean(seen.surprise)
            total = total + training.commitment * surprise
            measures = {**measures, "surprise": surprise}
        error = jnp.mean(seen.error) if N > 1 else jnp.float32(0)
        if teacher is not None:
            total = total + training.distillation * measures["kl"] + training.hidden * measures["hidden"]
        return total, (dict(loss=total, task=task, commitment=commitment, error=error, **measures), seen)

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen: Any, batch: Batch, teacher: Any = None) -> tuple[TrainState, dict[str, Array]]:
        params, codecs, opt_state, number = state
        arguments = (params, frozen, codecs, batch, step_key(training, number), teacher)
        if training.trains == "codebooks":
            _, (metrics, seen) = loss(*arguments)
        else:
            (_, (metrics, seen)), grads = jax.value_and_grad(loss, has_aux=True)(*arguments)
            updates, opt_state = tx.update(memory.spread(grads), opt_state, params)
            params = optax.apply_updates(params, updates)
        if N > 1:
            model = nnx.merge(graphdef, params, frozen, codecs)
            model.codec.follow(seen, training.ema_decay, training.revive_below)
            codecs = nnx.split(model, BY_GRADIENT, ...)[2]  # type: ignore[misc]
        metrics["learning_rate"] = rate(number // training.accumulate)
        return memory.spread(TrainState(params, codecs, opt_state, number + 1)), metrics

    return step


def check_groups(codec: Quantizer, groups: tuple[int, ...]) -> None:
    """Raises AstraError for numbers of groups that the codec cannot be used with."""
    if groups and not codec.nested:
        raise AstraError("--groups needs codes of which some groups would do: run `astra calibrate --codec nested-pq`")
    if groups and max(groups) > codec.groups:
        raise AstraError(f"--groups is {groups}; the checkpoint has {codec.groups}: give no more")


def draw_shards(training: Training, step: int) -> int:
    """N of a step: the same for the same seed and step, whatever came before."""
    return int(np.random.default_rng((training.seed, step)).choice(training.shards))


def step_key(training: Training, step: Any) -> Key[Array, ""]:
    """The random key of a step, from which all is drawn that is drawn on the devices."""
    return jax.random.fold_in(jax.random.key(training.seed), step)


def draw_groups(training: Training, key: Key[Array, ""]) -> Int[Array, ""] | None:
    """m of a step; None for all groups."""
    return jax.random.choice(jax.random.fold_in(key, 1), jnp.asarray(training.groups)) if training.groups else None


def strategy_of(
    model: Any, training: Training, N: int, batch: Batch, key: Key[Array, ""], memory: Memory = ONE_DEVICE
) -> Single | Astra:
    """How a step runs its model: on one device, or on N virtual shards with what is drawn from its key."""
    shards = model.shards(N, batch["input"])
    if N == 1:
        return FrugalSingle(shards, memory=memory)
    if training.cuts == "random":
        B = len(jax.tree.leaves(batch["input"])[0])
        shards = move_cuts(shards, jax.random.fold_in(key, 2), B)
    there = jnp.moveaxis(batch["arrived"], 0, 1) if training.packet_loss else None
    groups = draw_groups(training, key)
    return NoiseAugmented.virtual(shards, there, groups, key=key, strength=training.noise, memory=memory)


def with_room(shards: Shards) -> Shards:
    """An even split with slots for whatever `move_cuts` makes of it: `2 S - 1`."""
    return dataclasses.replace(shards, slots=2 * shards.S - 1)


def move_cuts(shards: Shards, key: Key[Array, ""], B: int) -> Shards:
    """An even split whose cuts are moved at random, in each of B sequences on its own.

    Each cut moves by up to `(m - 1) // 2` tokens to either side, all such moves being as likely, where m is the least
    that a shard of the sequence has in the even split. So every shard keeps 1 token and gets at most 2 m (m + 1, where
    m is 0), all are as long on average as they were, and no cut has to know of the others (our choice).
    """
    even = jnp.broadcast_to(jnp.asarray(shards.lengths), (B, shards.N))
    most = jnp.maximum(even.min(axis=-1, keepdims=True) - 1, 0) // 2
    moves = jax.random.randint(key, (B, shards.N - 1), -most, most + 1)
    ends = jnp.pad(moves, ((0, 0), (1, 1)))  # a sequence begins and ends where it did
    return dataclasses.replace(with_room(shards), lengths=even + jnp.diff(ends))


def draw_packet_loss(
    model: Any, training: Training, N: int, inputs: Any, step: int
) -> tuple[float, Bool[np.ndarray, "B L N slots"]]:
    """The share of packets that a step on N shards loses, and which codes arrive; on the host, by seed and step.

    Packets are filled as on a link: with the codes of as many groups as the step uses, and with its padding.

    Raises:
      AstraError: a packet is too small for a token.
    """
    rng = np.random.default_rng((training.seed, step, 1))  # not what draws N
    packet_loss = PacketLoss(float(rng.uniform(0, training.packet_loss)))
    shards = model.shards(N, inputs)
    m = draw_groups(training, step_key(training, step))
    astra = model.astra if m is None else model.astra.with_groups(int(m))
    kinds = astra.kinds(model.config.num_hidden_layers)
    there = arrived(
        packet_loss,
        with_room(shards) if training.cuts == "random" else shards,
        astra.token_bits,
        len(kinds),
        len(jax.tree.leaves(inputs)[0]),
        rng,
        kinds,
    )
    return packet_loss.rate, np.moveaxis(there, 1, 0)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C, and SIGTERM, by which a machine is taken away, into a question, "did one come?", so that a step is
    finished and saved; a second interrupts."""
    came = False

    def handler(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def count_tokens(model: Any, inputs: Any) -> int:
    """Tokens in a batch: of texts those that are there, of images their patches."""
    if model.config.input_kind == "images":
        return len(inputs) * model.shards(1).T
    return int(np.sum(inputs.lengths))


class Log:
    """Writes what steps gave, some steps later, so that devices need not wait for it.

    A row has also how long its step took, which is the time from one step's end to the next's.
    """

    AHEAD = 4  # steps that devices may be ahead of the log

    def __init__(self, journal: Journal, advance: Callable[..., None], devices: int):
        self.journal, self.advance, self.devices = journal, advance, devices
        self.waiting: deque[tuple[dict[str, Any], dict[str, Array]]] = deque()
        self.before = time.perf_counter()

    def add(self, row: dict[str, Any], metrics: dict[str, Array]) -> None:
        """A step that was begun. Raises AstraError where the loss of an earlier one is not finite."""
        self.waiting.append((row, metrics))
        if len(self.waiting) > self.AHEAD:
            self._write()

    def flush(self) -> None:
        """Waits for all steps. Raises AstraError where a loss is not finite."""
        while self.waiting:
            self._write()

    def _write(self) -> None:
        row, metrics = self.waiting.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        seconds, self.before = now - self.before, now
        if not np.isfinite(values["loss"]):
            raise AstraError(f"the loss is {values['loss']} at step {row['step']}: try a lower --learning-rate")
        tokens = row.pop("tokens")
        speed = {"steps/s": 1 / seconds, "tokens/s and device": tokens / seconds / self.devices}
        self.journal.write({**row, **values, "tokens": tokens, "seconds": seconds})
        self.advance(**{name: values[name] for name in ("loss", "accuracy", "perplexity") if name in values}, **speed)


TRACED = range(3, 6)  # the steps of a run of which a trace is written: the first ones compile


@contextmanager
def traced(folder: Path | None, wait: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Yields what is called before every step. `wait` waits for those that were begun, so that a trace has all of its
    own steps and nothing of others."""
    calls, running = 0, False

    def step() -> None:
        nonlocal calls, running
        calls += 1
        if folder is not None and calls == TRACED.start:
            wait()
            jax.profiler.start_trace(str(folder))
            running = True
        elif running and calls == TRACED.stop:
            wait()
            jax.profiler.stop_trace()
            running = False

    try:
        yield step
    finally:
        if running:
            jax.profiler.stop_trace()


def train(
    model: Any,
    training: Training,
    data: Any,
    out: Path,
    *,
    memory: Memory,
    source: dict[str, Any],
    save_every: int,
    label: str,
    profile: Path | None = None,
) -> tuple[Any, int]:
    """Trains for `training.steps` steps, or resumes what `out` holds of the same training.

    Args:
      model: what to start from; it is left as it is.
      data: an infinite iterator of `Batch` with `get_state` and `set_state`.
      out: folder for `train/` (the saved states) and `train.jsonl`.
      memory: the devices, and what else a step saves memory with.
      source: what `model` and `data` come from, for JSON; with the same settings and source a run is resumed.
      save_every: steps between saved states.
      label: of the progress bar.
      profile: folder for a trace of some steps, which TensorBoard and Perfetto show.

    Returns:
      the trained model, and how many steps it has had: fewer than asked for after Ctrl-C.

    Raises:
      AstraError: `save_every` is below 1, `out` holds a run with other settings, or a damaged one, another process
        trains into it, the batch does not divide over the devices, too few steps are left for a trace, the disk is
        full, or the loss is not finite.
    """
    if save_every < 1:
        raise AstraError(f"--save-every is {save_every}; it must be at least 1: try 100")
    memory.check(training.batch_size)
    if max(training.shards) > 1:
        check_groups(need_codec(model.codec), training.groups)
    graphdef, frozen, state = start(model, training, memory)
    # The model's own parameters, which no step donates; a resumed run has them from the same model.
    teacher = memory.spread(divide(model, training)[1]) if training.has_teacher else None
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({**dataclasses.asdict(training), **source, "first_batch": first_batch(data)}))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        alone(out / LOCK, occupied(out)),
        in_utf8(out) as where,
        ocp.CheckpointManager(where / "train", options=options) as manager,
    ):
        if manager.latest_step() is not None:
            state = restore(manager, state, data, settings, out)
        done = int(state.step)
        if profile is not None and training.steps - done < len(TRACED) + TRACED.start - 1:
            raise AstraError(
                f"--profile is of the third to the fifth step, and {training.steps - done} are left: leave it out"
            )
        journal = Journal(out / "train.jsonl", done)
        steps = {N: make_step(graphdef, training, N, memory) for N in sorted(set(training.shards))}
        with (
            journal.file,
            stop_on_signal() as stopped,
            progress(label, training.steps, done) as advance,
            traced(profile, lambda: log.flush()) as trace,
        ):
            log = Log(journal, advance, memory.devices)
            while done < training.steps and not stopped():
                trace()
                batch, N, values = next(data), draw_shards(training, done), {}
                if training.packet_loss and N > 1:
                    values["lost"], there = draw_packet_loss(model, training, N, batch["input"], done)
                    batch = {**batch, "arrived": there}
                values["tokens"] = count_tokens(model, batch["input"])
                state, metrics = steps[N](state, frozen, memory.batch(batch), teacher)
                done += 1
                log.add({"step": done, "shards": N, **values}, metrics)
                if done % save_every == 0 and done < training.steps:
                    log.flush()
                    save(manager, state, data, settings, out)
            log.flush()
            if manager.latest_step() != done:
                save(manager, state, data, settings, out)
    return nnx.merge(graphdef, state.params, frozen, state.codecs), done
