"""Rows of a data set: from the hub, tables, text files, pictures and folders of them; their columns and labels."""

import glob
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from astra_jax.errors import AstraError

# Files that are read -> the loader of `datasets` and its options.
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".jsonl": ("json", {}),
    ".txt": ("text", {}),
}


def read(source: str, split: str, *, pictures: bool = False, separator: str | None = None) -> Any:
    """The rows of a split as a `datasets.Dataset`; of text files a row per document, without empty ones.

    Args:
      source: a hub id (`owner/name`), a file, a folder of files, or, for pictures, a folder of pictures.
      split: `test`, `test[:1000]`, `train[10%:20%]`, `train+validation`. `valid`, `val` and `dev` are the same.
      pictures: whether pictures are wanted, which parquet files and folders of pictures hold, or text.
      separator: what stands between the documents of a text file; None if every file is one document.

    Raises:
      AstraError: the data cannot be read, or the split does not exist.
    """
    import datasets  # takes over a second: only for those who read data

    parts = [re.fullmatch(r"([\w.-]+)(\[[^\[\]]*\])?", part.strip()) for part in split.split("+")]
    if None in parts:
        raise AstraError(f"--split {split}: write it like test, test[:1000] or train[10%:20%]")
    suffixes = (".parquet",) if pictures else tuple(LOADERS)

    path = Path(source).expanduser()
    if not path.exists() and (path.suffix in LOADERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)):
        raise AstraError(f"{source}: no such file or folder: check the path, or give a hub id such as owner/name")
    advice = (
        "check the files and --split" if path.exists() else "no local folder has that name: check it, and the network"
    )
    features: Any = None
    options: dict[str, Any] = {}
    with reading(f"{source}, split {split}", advice):
        if path.is_file():
            if path.suffix not in suffixes:
                raise AstraError(f"{path}: not a {' or '.join(suffixes)} file: give one, a folder or a hub id")
            loader, options = LOADERS[path.suffix]
            files = {_split_of(path.stem, split): [_literal(path)]}
        elif path.is_dir() and not _is_dataset_repository(path, suffixes):
            if not pictures:
                raise AstraError(f"{path}: the folder has no {' or '.join(suffixes)} files: give another one")
            loader, files = "imagefolder", _picture_files(path)
        else:
            builder = datasets.load_dataset_builder(str(path) if path.is_dir() else source)
            loader, features = builder.name, builder.info.features
            files = {str(key): list(found) for key, found in (builder.config.data_files or {}).items()}
            files = files or {str(key): [] for key in builder.info.splits or ()}
        names = [_resolve(part[1], source, list(files)) for part in parts if part]
        split = "+".join(name + (part[2] or "") for name, part in zip(names, parts, strict=True) if part)
        wanted = {name: files[name] for name in sorted(set(names))}
        if loader == "text":
            return _documents(wanted, split, separator)
        if separator is not None:
            raise AstraError(f"--separator: {source} is no text file: a row is a document there; leave the option out")
        if loader == "imagefolder" and path.is_dir():
            # All splits, not only the wanted one: together they say which classes there are.
            return datasets.load_dataset(loader, data_files=files, split=split, trust_remote_code=False)
        if loader == "parquet" or path.is_file():
            # load_dataset(name, split=...) would download every split; a parquet file names its classes by itself.
            return datasets.load_dataset(
                loader, data_files=wanted, features=features, split=split, **options, trust_remote_code=False
            )
        return datasets.load_dataset(str(path) if path.is_dir() else source, split=split, trust_remote_code=False)


@contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Silences the progress bars and logs of `datasets` and the hub, and turns whatever they raise into one line."""
    import datasets

    shown, disabled = not datasets.are_progress_bars_disabled(), logging.root.manager.disable
    datasets.disable_progress_bars()
    logging.disable(logging.CRITICAL)
    try:
        yield
    except AstraError:
        raise
    except Exception as error:  # OSError, ValueError, ArrowInvalid, httpx's and the hub's errors, RuntimeError, ...
        cause: BaseException = error
        while isinstance(cause, datasets.exceptions.DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        if isinstance(cause, UnicodeDecodeError):
            advice = "save the file as UTF-8"
        raise AstraError(f"{what}: cannot be read ({reason}): {advice}") from error
    finally:
        logging.disable(disabled)
        if shown:
            datasets.enable_progress_bars()


def _documents(files: dict[str, list[str]], split: str, separator: str | None) -> Any:
    """Text files as rows with one column, `text`. A slice such as `test[:100]` counts documents."""
    import datasets

    if separator == "":
        raise AstraError("--separator is empty: write what separates documents, or leave the option out")
    # utf-8-sig: some editors put an invisible mark before UTF-8 text.
    whole = datasets.load_dataset(
        "text", data_files=files, sample_by="document", encoding="utf-8-sig", trust_remote_code=False
    )
    documents = {
        name: [
            document.strip()
            for text in rows["text"]
            for document in (text.split(separator) if separator else [text])
            if document.strip()
        ]
        for name, rows in whole.items()
    }
    chosen = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(d) for name, d in documents.items()})
    text = [document for part in chosen for document in documents[part.splitname][part.from_ : part.to]]
    return datasets.Dataset.from_dict({"text": text}, features=datasets.Features({"text": datasets.Value("string")}))


def _resolve(name: str, source: str, available: Sequence[str]) -> str:
    """The split as the data call it. Raises AstraError if they have none of that name or meaning."""
    words = _split_names()
    same = [split for split in available if words.get(split, split) == words.get(name, name)]
    if not same:
        raise AstraError(
            f"{source} has no split {name!r}; it has {', '.join(available) or 'none'}: choose with --split"
        )
    return name if name in same else same[0]


def _split_names() -> dict[str, str]:
    """Words in names of files and folders -> split, as everywhere in `datasets` (`val` -> `validation`)."""
    from datasets.data_files import SPLIT_KEYWORDS

    return {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}


def _split_of(stem: str, wanted: str) -> str:
    """`test-00000-of-00001` -> `test`; a file with no such word in its name is whichever split is wanted of it."""
    names = _split_names()
    first = re.split(r"[\[+]", wanted)[0].strip()
    return next((names[word] for word in re.split(r"[-._ 0-9]+", stem) if word in names), names.get(first, first))


def _is_dataset_repository(folder: Path, suffixes: Sequence[str]) -> bool:
    """Whether `datasets` finds its way: files of these kinds, or a card that lists files."""
    card = folder / "README.md"
    found = (file.name for s in suffixes for pattern in (f"*{s}", f"*/*{s}") for file in folder.glob(pattern))
    return any(name != "metadata.parquet" for name in found) or (
        card.is_file() and "data_files:" in card.read_text(encoding="utf8", errors="replace")
    )


def _picture_files(folder: Path) -> dict[str, list[str]]:
    """Split -> patterns of files.

    `datasets` looks for split names anywhere in a path, so that the class folders `train` (the vehicle) or `test_tube`
    would become splits and the other classes vanish. Here only a top folder that itself holds class folders (or a
    metadata file) is a split.
    """
    names = _split_names()
    splits: dict[str, list[str]] = {}
    for child in sorted(folder.iterdir()):
        inside = child.iterdir() if child.is_dir() and child.name in names else ()
        if any(inner.is_dir() or inner.stem == "metadata" for inner in inside):
            splits.setdefault(names[child.name], []).append(f"{_literal(child)}/**")
    return splits or {"train": [f"{_literal(folder)}/**"]}


def _literal(path: Path) -> str:
    """A path in which `[`, `*` and `?` are no wildcards, absolute since `datasets` would otherwise look it up twice."""
    return glob.escape(str(path.absolute()))


# --- columns and labels -------------------------------------------------------------------------------------------


def is_text(feature: Any) -> bool:
    """Whether a column of `datasets` holds text."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def need_column(features: Any, name: str, option: str, where: str) -> str:
    """The column of that name. Raises AstraError where there is none."""
    if name not in features:
        raise AstraError(f"{option} {name}: {where} has no such column; it has {', '.join(features)}")
    return name


def choose_column(features: Any, name: str | None, fits: Callable[[Any], bool], what: str, where: str) -> str:
    """The named column, or the only one that fits, or the one of those that is called `what`.

    Raises AstraError where there is none or a choice.
    """
    if name is not None:
        return need_column(features, name, f"--{what}-column", where)
    found = [column for column, feature in features.items() if fits(feature)]
    if len(found) != 1 and what in features:
        return what
    if len(found) > 1:
        raise AstraError(f"{where} has several {what} columns, {', '.join(found)}: choose with --{what}-column")
    if not found:
        hint = " (FOLDER/CLASS/PICTURE or FOLDER/SPLIT/CLASS/PICTURE with two or more classes names them)"
        raise AstraError(
            f"{where} has no {what} column among {', '.join(features)}{hint if what == 'label' else ''}: "
            f"choose with --{what}-column"
        )
    return found[0]


def read_labels(
    rows: Any, label_column: str | None, classes: Sequence[str] | None, where: str
) -> tuple[Int[np.ndarray, "rows"], tuple[str, ...]]:
    """The class of every row, and the names of the classes.

    Args:
      rows: a `datasets.Dataset`.
      label_column: needed only where the columns' types leave a choice.
      classes: those of a checkpoint; see `class_indices`.

    Raises:
      AstraError: the column does not exist or holds no labels, or they do not fit the classes.
    """
    import datasets

    column = choose_column(
        rows.features, label_column, lambda feature: isinstance(feature, datasets.ClassLabel), "label", where
    )
    values, names = _labels(rows, column, classes, where)
    indices = class_indices(names, classes, where)
    outside = np.flatnonzero((values < 0) | (values >= len(names)))
    if outside.size:
        row = int(outside[0])
        raise AstraError(
            f"{where} row {row}: the label {values[row]} is outside the classes 0..{len(names) - 1}: "
            "is this split unlabelled, or the data set another one?"
        )
    return indices[values], tuple(classes or names)


def _labels(
    rows: Any, column: str, classes: Sequence[str] | None, where: str
) -> tuple[Int[np.ndarray, "rows"], tuple[str, ...]]:
    """Numbers of all rows and the names of these numbers. A column of text or of plain numbers works when named."""
    import datasets

    feature, values = rows.features[column], rows.data.column(column)
    if values.null_count:
        row = values.is_null().index(True).as_py()
        raise AstraError(f"{where} row {row}: has no label in the column {column!r}: remove the row")
    numbers = values.to_numpy()
    if isinstance(feature, datasets.ClassLabel):
        return numbers, tuple(feature.names)
    if numbers.dtype.kind in "iu":
        # Without names a label is the checkpoint's own number.
        return numbers, tuple(classes or map(str, range(int(numbers.max()) + 1)))
    if is_text(feature):
        names, numbers = np.unique(numbers.astype(str), return_inverse=True)
        return numbers, tuple(map(str, names))
    raise AstraError(f"--label-column {column}: {where} has {feature} there; labels are whole numbers or text")


def class_indices(names: Sequence[str], classes: Sequence[str] | None, where: str) -> Int[np.ndarray, "names"]:
    """Index into the checkpoint's classes of every class of the data, int32.

    By name where the names are the same, by number where one side only numbers its classes, or both have equally many
    and none has moved.
    """
    own = np.arange(len(names), dtype=np.int32)
    if classes is None or tuple(names) == tuple(classes):
        return own
    if len(names) > len(classes):
        raise AstraError(
            f"{where} has {len(names)} classes and the model {len(classes)}: "
            "evaluate a checkpoint that was trained on these classes"
        )
    shared = set(names) & set(classes)
    if len(shared) == len(names) == len(set(names)) and all(classes.count(name) == 1 for name in names):
        return np.asarray([classes.index(name) for name in names], np.int32)
    in_place = all(name == other for name, other in zip(names, classes, strict=False) if {name, other} & shared)
    number = re.compile(r"((label|class)_)?\d+", re.IGNORECASE)
    numbered = any(all(number.fullmatch(name) for name in side) for side in (names, classes))
    if in_place and (numbered or len(names) == len(classes)):
        return own
    unknown = next((name for name in names if name not in shared), names[0])
    raise AstraError(
        f"{where} has classes that do not match the model's: {unknown!r} is not (or not once) among its "
        f"{len(classes)} classes, such as {classes[0]!r}: rename the classes, or choose another --label-column"
    )
