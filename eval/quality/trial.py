"""What a checkpoint reaches on data: the accuracy of a classifier of images or texts, the perplexity of a language
model over sliding windows, how well the similarity of sentence embeddings follows what people say, or how often the
nearest neighbours of a picture's embedding are of its class."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from astra_jax.inputs.token_batches import Text, longest
from astra_jax.report import progress
from checkpoints import Checkpoint
from eval.datasets.account import Tell
from eval.datasets.labelled import DataArgs, batches
from eval.datasets.labels import model_classes
from eval.datasets.windows import encode, run_batches, windows
from eval.quality.neighbours import neighbour_accuracy, voters
from eval.quality.perplexity import NextTokenLoss, perplexity
from eval.quality.similarity import correlations
from eval.quality.tasks import task_of
from eval.quality.ways import Run, Way

Metrics = dict[str, Any]  # columns of a row: numbers by their names


class Sliding(NamedTuple):
    """Windows over documents: their length, and by how much they move on, in tokens."""

    length: int
    stride: int


@dataclasses.dataclass(frozen=True)
class Trial:
    """A checkpoint, about to show what it can do.

    Attributes:
      checkpoint: what is run.
      way: how.
      data: what is read.
      say: is told what is done to the texts.
      tell: is told what is read.
      limit: the most images, documents, texts or pairs; None for all.
      batch_size: images, texts or windows; by default 64, of windows 8.
      sliding: the windows of perplexity.
    """

    checkpoint: Checkpoint
    way: Way
    data: DataArgs
    say: Callable[[str], None]
    tell: Tell
    limit: int | None = None
    batch_size: int | None = None
    sliding: Sliding | None = None

    def tried(self, model: Any, score: Callable[[Run, str], Metrics]) -> list[Metrics]:
        """What `score(run, label)` finds of a model in every try; the label goes behind that of a progress bar."""
        return [score(run, label) for label, run in self.way.runs(model)]

    def encode(self, texts: Sequence[str | tuple[str, str]], limit: int | None = None) -> list[list[int]]:
        """The token ids of texts, cut to `limit` tokens if given."""
        encoded, cut = encode(self.checkpoint.tokenizer, texts, limit)
        if cut:
            self.say(f"{cut:,} of {len(texts):,} texts were cut to {limit:,} tokens")
        return encoded

    def say_short(self, sequences: Sequence[Sequence[int]], what: str) -> None:
        """Says how many sequences cannot be split over all devices."""
        lengths = np.asarray([len(ids) for ids in sequences])
        no_ids = np.broadcast_to(np.int32(0), (len(lengths), max(lengths, default=1)))
        shards = self.way.shards(self.checkpoint.model, Text(no_ids, lengths))
        short = int(np.sum(np.min(shards.lengths, axis=-1) < 1))
        if short:
            self.say(
                f"{short:,} of {len(lengths):,} {what} are too short for all {self.way.N} devices and use only some of "
                "them"
            )

    def outputs(self, run: Run, sequences: Sequence[list[int]], label: str) -> Float[np.ndarray, "texts outputs"]:
        """What a model makes of every text: logits or an embedding."""
        limit, batch = longest(self.checkpoint.config), self.batch_size or 64
        rows = dict(run_batches(run, sequences, limit, batch, f"texts{label}"))
        return np.stack([rows[place] for place in range(len(rows))])

    def short_texts(self, texts: Sequence[str | tuple[str, str]]) -> list[list[int]]:
        """The token ids of texts that the model takes whole, or cut to what it takes."""
        sequences = self.encode(texts, longest(self.checkpoint.config))
        self.say_short(sequences, "texts")
        return sequences


def image_outputs(
    trial: Trial, run: Run, data: Any, label: str
) -> Iterator[tuple[Float[np.ndarray, "B outputs"], Int[np.ndarray, "B"]]]:
    """What a model makes of pictures, batch by batch, and their labels."""
    batch, total = trial.batch_size or 64, min(len(data), trial.limit or len(data))
    with progress(f"images{label}", total) as advance:
        for images, labels in batches(data, trial.checkpoint.processor, batch, limit=trial.limit):
            # The last batch is filled up, so that one compiled program serves all.
            filled = np.pad(images, [(0, batch - len(images))] + [(0, 0)] * 3)
            yield np.asarray(run(filled))[: len(labels)], labels
            advance(len(labels))


def image_accuracy(trial: Trial) -> list[Metrics]:
    """Share of the images whose highest logit is their label."""
    data = trial.data.open(model_classes(trial.checkpoint))
    trial.tell(data.account.first(trial.limit, data.labels))

    def score(run: Run, label: str) -> Metrics:
        right = [found.argmax(-1) == labels for found, labels in image_outputs(trial, run, data, label)]
        return {"accuracy %": 100 * float(np.concatenate(right).mean())}

    return trial.tried(trial.checkpoint.model, score)


def image_neighbours(trial: Trial) -> list[Metrics]:
    """Share of the images that their nearest neighbours among the others say the label of."""
    data = trial.data.open()
    trial.tell(data.account.first(trial.limit, data.labels))
    labels = np.asarray(data.labels)[: trial.limit]
    k = voters(labels)
    trial.say(f"each of {len(labels):,} images is given the class that its {k} nearest others vote for, by cosine")

    def score(run: Run, label: str) -> Metrics:
        embeddings = [found for found, _ in image_outputs(trial, run, data, label)]
        return neighbour_accuracy(np.concatenate(embeddings), labels, k)

    return trial.tried(trial.checkpoint.model, score)


def text_accuracy(trial: Trial) -> list[Metrics]:
    """Share of the texts whose highest logit is their label."""
    data = trial.data.open_labelled(model_classes(trial.checkpoint))
    trial.tell(data.account.first(trial.limit, data.labels))
    rows = [data[i] for i in range(min(len(data), trial.limit or len(data)))]
    labels, sequences = [row["label"] for row in rows], trial.short_texts([row["text"] for row in rows])

    def score(run: Run, label: str) -> Metrics:
        predicted = np.argmax(trial.outputs(run, sequences, label), axis=-1)
        return {"accuracy %": 100 * float(np.mean(predicted == labels))}

    return trial.tried(trial.checkpoint.model, score)


def text_perplexity(trial: Trial) -> list[Metrics]:
    """Perplexity of the documents over sliding windows."""
    assert trial.sliding is not None
    length, stride = trial.sliding
    texts = trial.data.open_documents()
    trial.tell(texts.account.first(trial.limit))
    documents = trial.encode(texts[: trial.limit])
    if short := sum(len(ids) < 2 for ids in documents):
        trial.say(f"{short:,} document(s) of less than 2 tokens are left out: nothing is predicted in them")
    trial.say(f"{len(documents):,} document(s) in windows of {length:,} tokens, stride {stride:,}")
    parts = [part for ids in documents for part in windows(ids, length, stride)]
    trial.say_short([part.ids for part in parts], "windows")
    ends = sum(len(part.ids) - 1 - part.counted for part in parts if part.counted and len(part.ids) < length)
    if trial.way.strategy == "astra" and ends:
        total = sum(len(part.ids) - 1 - part.counted for part in parts)
        trial.say(
            f"{ends:,} of {total:,} predictions count in the shorter last window of a document, at the ends of shards "
            "alone, where more of the context is exact"
        )

    def score(run: Run, label: str) -> Metrics:
        found = perplexity(run, documents, length, stride, trial.batch_size or 8, f"windows{label}")
        return {"perplexity": found.perplexity, "nats per token": found.nll, "tokens": found.tokens}

    return trial.tried(NextTokenLoss(trial.checkpoint.model), score)


def similarity(trial: Trial) -> list[Metrics]:
    """How the similarities of the embeddings of two sentences correlate with what people say of them."""
    pairs = trial.data.open_pairs()
    trial.tell(pairs.account.first(trial.limit))
    first, second, scores = zip(*pairs[: trial.limit], strict=True)
    sequences, by = trial.short_texts(first + second), trial.checkpoint.config.similarity

    def score(run: Run, label: str) -> Metrics:
        embeddings = trial.outputs(run, sequences, label)
        return correlations(embeddings[: len(first)], embeddings[len(first) :], np.asarray(scores), by)

    return trial.tried(trial.checkpoint.model, score)


# By the kind of the inputs, and the task.
MEASURES = {
    ("text", "perplexity"): text_perplexity,
    ("text", "classification"): text_accuracy,
    ("text", "similarity"): similarity,
    ("images", "classification"): image_accuracy,
    ("images", "neighbours"): image_neighbours,
}


def reached(trial: Trial) -> list[Metrics]:
    """What a checkpoint reaches in every try, of what it was made for."""
    config = trial.checkpoint.config
    return MEASURES[config.input_kind, task_of(config)](trial)
