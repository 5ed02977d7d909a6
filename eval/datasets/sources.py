"""Rows of a data set: from the hub, tables, text files and pictures with metadata; their columns and labels."""

import dataclasses
import glob
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from astra_jax.errors import AstraError
from astra_jax.files import is_disk_full
from eval.datasets.account import Account
from eval.datasets.files import allowed, is_regular, kinds, shown, suffix_of, walk
from eval.datasets.splits import Part, chosen, meaning, names_of, resolve, split_of
from eval.datasets.tables import check_depth, is_numeric, read_table, read_text

# Files that are read -> what reads them. Of a folder with several kinds those that come first here are the data.
KINDS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".txt": "text"}


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows that were asked for.

    Attributes:
      table: a `datasets.Dataset`.
      where: what messages call the data.
      of: rows of the splits that were asked for.
      every: tables of all splits of the data, whatever was asked for.
      root: the folder of files that a row may name; None for none.
      numeric: columns of text whose values are all numbers.
      left_out, notes: see `Account`.
    """

    table: Any
    where: str
    of: int = 0
    every: Callable[[], list[Any]] = list
    root: Path | None = None
    numeric: frozenset[str] = frozenset()
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def features(self) -> Any:
        """Column -> its type."""
        return self.table.features

    def __len__(self) -> int:
        return len(self.table)

    def account(self, what: str, **values: Any) -> Account:
        """What was read: all of it, if `values` do not say otherwise."""
        found: dict[str, Any] = {"read": len(self), "of": self.of, "left_out": self.left_out, "notes": self.notes}
        return Account(where=self.where, what=what, **(found | values))


class Loaded(NamedTuple):
    """A split, whole; see `Rows`."""

    table: Any
    numeric: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


class Found(NamedTuple):
    """Data that are there: the names of their splits, how to load some of these, and files that are in none."""

    splits: list[str]
    load: Callable[[list[str]], dict[str, Loaded]]
    left_out: dict[str, int]


def read(source: str, split: str, *, pictures: bool = False, separator: str | None = None) -> Rows:
    """The rows of a split; of text files a row per document, without empty ones.

    Args:
      source: a hub id (`owner/name`), a file, a folder of files, or, for pictures, a folder with metadata.
      split: `test`, `test[:1000]`, `train[10%:20%]`, `train+validation`. `valid`, `val` and `dev` are the same.
      pictures: whether pictures are wanted, which parquet files and folders of pictures hold, or text.
      separator: what stands between the documents of a text file; None if every file is one document.

    Raises:
      AstraError: the data cannot be read, or the split does not exist.
    """
    wanted, path = names_of(split), Path(source).expanduser()
    local = _is_local(source, path)
    if separator == "":
        raise AstraError("--separator is empty: write what separates documents, or leave the option out")
    advice = "check the files and --split" if local else "no local folder has that name: check it, and the network"
    where = f"{shown(source)}, split {split},"
    with reading(where[:-1], advice):
        if local and not has_card(path):
            found = _in_files(path, meaning(wanted[0]), pictures, separator)
        else:
            found = _described(source, path if local else None, separator)
        names = list(dict.fromkeys(resolve(name, source, found.splits) for name in wanted))
        splits = found.load(names)
        parts = chosen(split, {name: len(splits[name].table) for name in names}, source)
        return Rows(
            table=_joined([_rows(splits[part.split].table, part) for part in parts]),
            where=where,
            of=sum(len(splits[name].table) for name in names),
            every=lambda: [loaded.table for loaded in found.load(found.splits).values()],
            root=_root(path if local else None),
            numeric=frozenset.intersection(*(splits[name].numeric for name in names)),
            left_out=found.left_out,
            notes=tuple(note for name in names for note in splits[name].notes),
        )


def _is_local(source: str, path: Path) -> bool:
    """Whether a source is there, and not one of the hub's. Raises AstraError where it can be neither."""
    if os.path.lexists(path):
        return True
    if suffix_of(path) in KINDS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise AstraError(f"{source}: no such file or folder: check the path, or give a hub id such as owner/name")
    return False


def _rows(table: Any, part: Part) -> Any:
    return table.select(range(part.start, part.stop) if part.start < part.stop else [])


def _joined(tables: list[Any]) -> Any:
    import datasets

    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


def _root(path: Path | None) -> Path:
    """Where files lie that data may name: of the hub, in the folder that it downloads to."""
    import datasets

    if path is None:
        return Path(datasets.config.HF_CACHE_HOME)
    return path if path.is_dir() else path.parent


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
        if is_disk_full(error):
            advice = f"free some space in {datasets.config.HF_CACHE_HOME}, where data are unpacked"
        if isinstance(cause, UnicodeEncodeError):
            advice = "give the file a name in UTF-8"
        raise AstraError(f"{what}: cannot be read ({reason}): {advice}") from error
    finally:
        logging.disable(disabled)
        if shown:
            datasets.enable_progress_bars()


# --- files --------------------------------------------------------------------------------------------------------


def _in_files(path: Path, split: str, pictures: bool, separator: str | None) -> Found:
    """The data in a file, or in files of a folder."""
    suffixes = [".parquet"] if pictures else list(KINDS)
    if not path.is_dir():
        return _in_file(path, split, suffixes, separator)
    inside = [file for file in walk(path) if file != "README.md"]
    data = [file for file in inside if suffix_of(file) in suffixes and os.path.basename(file) != "metadata.parquet"]
    if data:
        files = _splits(data)
        used = {file for of_split in files.values() for file in of_split}
        whole = {name: [str(path.absolute() / file) for file in of_split] for name, of_split in files.items()}
        load = _loader(KINDS[suffix_of(next(iter(used)))], whole, separator)
        return Found(list(files), load, kinds([file for file in inside if file not in used]))
    if not pictures:
        raise AstraError(f"{path}: the folder has no {' or '.join(suffixes)} files: give another one")
    files = _picture_files(path)
    return Found(list(files), lambda names: _load("imagefolder", data_files=files), {})


def _in_file(path: Path, split: str, suffixes: list[str], separator: str | None) -> Found:
    """The data in a file: the split that its name says, else the one that is asked for."""
    if suffix_of(path) not in suffixes:
        raise AstraError(f"{path}: not a {' or '.join(suffixes)} file: give one, a folder or a hub id")
    files = {split_of(path.stem) or split: [str(path.absolute())]}
    return Found(list(files), _loader(KINDS[suffix_of(path)], files, separator), {})


def _splits(files: Sequence[str]) -> dict[str, list[str]]:
    """Split -> files of one kind. Where some names say a split, the files whose names do not are in none."""
    by_kind: dict[str, dict[str | None, list[str]]] = {kind: {} for kind in KINDS}
    for file in files:
        parts = Path(file).with_suffix("").parts
        split = next((found for part in reversed(parts) if (found := split_of(part))), None)
        by_kind[suffix_of(file)].setdefault(split, []).append(file)
    there = [splits for splits in by_kind.values() if splits]
    best = next((splits for splits in there if set(splits) != {None}), there[0])
    named = {split: of_split for split, of_split in best.items() if split is not None}
    order = ["train", "validation", "test"]
    return {split: named[split] for split in order if split in named} or {"train": best[None]}


def _picture_files(folder: Path) -> dict[str, list[str]]:
    """Split -> patterns of files.

    `datasets` looks for split names anywhere in a path, so that the class folders `train` (the vehicle) or `test_tube`
    would become splits and the other classes vanish. Here only a top folder that itself holds class folders (or a
    metadata file) is a split.
    """
    splits: dict[str, list[str]] = {}
    for child in sorted(folder.iterdir()):
        inside = child.iterdir() if child.is_dir() and split_of(child.name) else ()
        if any(inner.is_dir() or inner.stem == "metadata" for inner in inside):
            splits.setdefault(split_of(child.name) or "", []).append(f"{_literal(child)}/**")
    return splits or {"train": [f"{_literal(folder)}/**"]}


def _literal(path: str | Path) -> str:
    """A path in which `[`, `*` and `?` are no wildcards, absolute since `datasets` would otherwise look it up twice."""
    return glob.escape(str(Path(path).absolute()))


def has_card(path: Path) -> bool:
    """Whether a folder's README.md lists the files of a data set."""
    card = path / "README.md"
    return card.is_file() and "data_files:" in card.read_text(encoding="utf8", errors="replace")


def _described(source: str, folder: Path | None, separator: str | None) -> Found:
    """Data whose files the hub knows, or the card of a local folder."""
    import datasets

    builder = datasets.load_dataset_builder(str(folder) if folder else source)
    kind, config = builder.name, builder.config
    files = {str(split): [str(file) for file in found] for split, found in (config.data_files or {}).items()}
    if folder:
        _check_card(folder, files)
    splits = list(files) or [str(split) for split in builder.info.splits or ()]
    if kind in ("csv", "text"):
        delimiter = getattr(config, "sep", None)
        if folder:
            return Found(splits, _loader(kind, files, separator, delimiter), {})

        def fetched(names: list[str]) -> dict[str, Loaded]:
            local = {name: datasets.DownloadManager().download_and_extract(files[name]) for name in names}
            return _loader(kind, local, separator, delimiter)(names)

        return Found(splits, fetched, {})
    _no_separator(source, separator)
    if kind == "parquet":
        # load_dataset(name) would download every split; a parquet file names its classes by itself.
        wanted = {split: list(map(_literal, found)) if folder else found for split, found in files.items()}
        features = builder.info.features
        return Found(splits, lambda names: _load(kind, data_files=_only(wanted, names), features=features), {})
    return Found(splits, lambda names: _load(str(folder) if folder else source), {})


def _check_card(folder: Path, files: dict[str, list[str]]) -> None:
    """Raises AstraError where a card lists files that are not in its folder."""
    for file in (file for of_split in files.values() for file in of_split):
        if allowed(file.split("::")[-1], folder) is None:
            raise AstraError(f"{folder / 'README.md'} lists {file}, which is no file in the folder: correct it")


def _loader(
    kind: str, files: dict[str, list[str]], separator: str | None, delimiter: str | None = None
) -> Callable[[list[str]], dict[str, Loaded]]:
    """Loads splits of local files."""
    for file in (file for of_split in files.values() for file in of_split):
        if not is_regular(file):
            raise AstraError(f"{shown(file)}: is no regular file: give one, a folder or a hub id")
    if kind == "text":
        return lambda names: {name: _documents(files[name], separator) for name in names}
    _no_separator(next(iter(files.values()))[0], separator)
    if kind == "csv":
        return lambda names: {name: _table(files[name], delimiter) for name in names}
    if kind == "json":
        for file in (file for of_split in files.values() for file in of_split):
            check_depth(Path(file))
    literal = {split: list(map(_literal, found)) for split, found in files.items()}
    return lambda names: _load(kind, data_files=_only(literal, names))


def _only(files: dict[str, list[str]], names: list[str]) -> dict[str, list[str]]:
    return {name: files[name] for name in names}


def _no_separator(source: str, separator: str | None) -> None:
    if separator is not None:
        raise AstraError(f"--separator: {source} is no text file: a row is a document there; leave the option out")


def _load(*args: Any, **options: Any) -> dict[str, Loaded]:
    import datasets

    loaded = datasets.load_dataset(*args, **options, trust_remote_code=False)
    for table in loaded.values():
        table.data.table.validate(full=True)  # or a text that is no UTF-8 would show when its row is read
    return {str(name): Loaded(table) for name, table in loaded.items()}


def _documents(files: Sequence[str], separator: str | None) -> Loaded:
    """Text files as rows with one column, `text`."""
    texts = [read_text(Path(file)) for file in files]
    documents = [part.strip() for text in texts for part in (text.split(separator) if separator else [text])]
    return Loaded(_strings({"text": [document for document in documents if document]}))


def _table(files: Sequence[str], delimiter: str | None) -> Loaded:
    """Files of one table, one below the other."""
    tables = [read_table(Path(file), delimiter or ("\t" if suffix_of(file) == ".tsv" else ",")) for file in files]
    columns = tables[0].columns
    for file, table in zip(files, tables, strict=True):
        if set(table.columns) != set(columns):
            raise AstraError(
                f"{shown(file)} has the columns {', '.join(table.columns)}, and {shown(files[0])} has "
                f"{', '.join(columns)}: give one of them"
            )
    joined = {name: [value for table in tables for value in table.columns[name]] for name in columns}
    numeric = frozenset(name for name, values in joined.items() if is_numeric(values))
    return Loaded(_strings(joined), numeric, tuple(table.note for table in tables if table.note))


def _strings(columns: dict[str, list[str]]) -> Any:
    import datasets

    kinds_of = datasets.Features({name: datasets.Value("large_string") for name in columns})
    return datasets.Dataset.from_dict(columns, features=kinds_of)
