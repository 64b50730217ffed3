"""From the words of a command line to the input of a prediction. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from mf_scale.config.urls import redact, scheme_of
from mf_scale.data.index import HEAD, Index
from mf_scale.data.single import local_path
from mf_scale.errors import UserError
from mf_scale.evaluation.prediction.files import SUFFIXES, FileSource, Lines, folder_images, urls_of_images
from mf_scale.evaluation.prediction.shards import IndexSource, TarSource
from mf_scale.evaluation.prediction.words import FILES, PARTS, Options

LIST_SUFFIXES = (".txt", ".lst", ".list")
TAR = ".tar"
MOST_FILES = 10_000
"""Images from which on results go into parts: file systems and people are slow with more files in a folder."""
SMALL_PART, PART = 8, 1000
"""Images of a part where results are three files an image, and where they go into tars."""
KINDS = f"an image ({', '.join(SUFFIXES)}), a folder of them, a list ({', '.join(LIST_SUFFIXES)}), a tar, or a source"


def open_input(words: Sequence[str], options: Options) -> tuple[FileSource | IndexSource | TarSource, str]:
    """The input, and how its results are laid out; raises UserError for words that name nothing that is read."""
    lists: list[Sequence[str]] = []
    tars: list[str] = []
    indexes: list[str] = []
    for word in words:
        kind, found = _look_at(word)
        if kind == "images":
            lists.append(found)
        else:
            (tars if kind == "tars" else indexes).extend(found)
    kinds = [name for name, some in (("images", lists), ("tars", tars), ("a source", indexes)) if some]
    if len(kinds) > 1 or len(indexes) > 1:
        raise UserError(
            f"the input is {' and '.join(kinds)}" if len(kinds) > 1 else f"the input is {len(indexes)} sources",
            where=" ".join(map(redact, words)),
            remedy="Predict each into a folder of its own.",
        )
    if indexes:
        return IndexSource(Index.open(indexes[0]), options.part_size or PART, options.image_ids), PARTS
    if tars:
        if options.part_size:
            raise UserError("a tar is a part of its own", where="--part-size", remedy="Leave it out.")
        return TarSource(tars, options.image_ids), PARTS
    total = sum(map(len, lists))
    if not total:
        raise UserError(
            "there is no image in what was given",
            where=" ".join(map(redact, words)),
            remedy=f"Images end in {', '.join(SUFFIXES)}.",
        )
    layout = PARTS if options.part_size or total > MOST_FILES else FILES
    size = options.part_size or (PART if layout == PARTS else SMALL_PART)
    return FileSource(lists, size, options.image_ids, named=layout == FILES), layout


def _look_at(word: str) -> tuple[str, Sequence[str]]:
    """images, tars or sources, and which."""
    path = local_path(word)
    if path is None:
        suffix = Path(word.partition("?")[0]).suffix.lower()
        with urls_of_images() if suffix in SUFFIXES else nullcontext():
            scheme_of(word)
        return ("images" if suffix in SUFFIXES else "tars" if suffix == TAR else "sources"), [word]
    if path.is_dir():
        return _look_into(path)
    suffix = path.suffix.lower()
    if suffix in (TAR, *LIST_SUFFIXES) and not path.is_file():
        raise UserError("the file does not exist", where=word, remedy="Check the path.")
    if suffix == TAR:
        return "tars", [str(path)]
    if suffix in LIST_SUFFIXES:
        lines = _lines(path)
        if not len(lines):
            raise UserError("the list names no image", where=word, remedy="It holds one path or url a line.")
        return "images", lines
    if path.is_file() and not suffix.startswith(SUFFIXES):
        raise UserError(f"this is not {KINDS}", where=word, remedy="Name it by its suffix.")
    return "images", [str(path)]


def _look_into(folder: Path) -> tuple[str, Sequence[str]]:
    try:
        if (folder / HEAD).is_file():
            return "sources", [str(folder)]
        images = folder_images(folder)
        tars = sorted(str(f) for f in folder.iterdir() if f.suffix.lower() == TAR and f.is_file())
    except OSError as error:
        raise UserError(f"the folder cannot be read: {error.strerror}", where=str(folder)) from error
    if images and tars:
        raise UserError(
            f"the folder holds {len(images)} images and {len(tars)} tars",
            where=str(folder),
            remedy="Name either: FOLDER/*.tar, or the images.",
        )
    return ("tars", tars) if tars else ("images", images)


def _lines(path: Path) -> Lines:
    try:
        return Lines(path)
    except OSError as error:
        raise UserError(f"the list cannot be read: {error.strerror}", where=str(path), remedy="Check it.") from error
