"""What a start knows of its classes: how many images hold them, and whose rows of the class head they take.

Fine-tuning across vocabularies: classes that the checkpoint of train.init_from has too keep their rows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mf_scale.config.schema import Config
from mf_scale.data.index import Index
from mf_scale.errors import UserError
from mf_scale.models.text_head import CLASS_ROWS
from mf_scale.rundir import VOCABULARY
from mf_scale.unify import MergeTable
from mf_scale.vocabulary import Vocabulary

CLASS_HEADS = {
    "mask_classification": "heads.class_head.",
    "per_pixel": "classifier.",
    "per_pixel_plus": "transformer_decoder.queries.",  # query k is class k
}
"""By model kind, how the names of the tensors begin that belong to the classes of one vocabulary."""
LENT = "classes-from-checkpoint.json"
"""File in the run directory: which class took whose row, whole."""
_SHOWN = 12
Meaning = str | tuple[str, str]
"""A row of a merge table, or a class of a vocabulary."""


@dataclass(frozen=True)
class LentClasses:
    """Two vocabularies, class by class."""

    saved: Vocabulary
    """Of the checkpoint."""
    vocabulary: Vocabulary
    """Of the run, K classes."""
    lenders: tuple[tuple[int, ...], ...]
    """[K]: labels in the checkpoint whose row the class takes, of several their mean; empty: it starts anew."""
    where: str

    def note(self) -> str:
        """Both lists, shortened."""
        kept = [f"{name}{_whose(name, old)}" for name, old in self._taken()]
        unused = len(self.saved) - len({label for labels in self.lenders for label in labels})
        return "\n".join(
            [
                f"{len(kept):,} of {len(self.lenders):,} classes take their rows of the class head from {self.where} "
                f"(vocabulary {self.saved.name!r}, {len(self.saved):,} classes, {unused:,} of them not used):",
                f"  kept {len(kept):>6,}  {_listed(kept)}",
                f"  anew {len(self.anew):>6,}  {_listed(self.anew)}",
                f"  all of them: {LENT} in the run directory",
            ]
        )

    def text(self) -> str:
        """Both lists whole, as JSON."""
        used = {label for labels in self.lenders for label in labels}
        lists = {
            "checkpoint": self.where,
            "its_vocabulary": self.saved.name,
            "kept": dict(self._taken()),
            "anew": self.anew,
            "not_used": [name for label, name in enumerate(self.saved.names) if label not in used],
        }
        return json.dumps(lists, indent=1, ensure_ascii=False)

    @property
    def anew(self) -> list[str]:
        """Classes that are initialised."""
        return [name for name, labels in zip(self.vocabulary.names, self.lenders, strict=True) if not labels]

    def _taken(self) -> Iterator[tuple[str, list[str]]]:
        for name, labels in zip(self.vocabulary.names, self.lenders, strict=True):
            if labels:
                yield name, [self.saved.names[label] for label in labels]


def lent_classes(config: Config, source: Path, vocabulary: Vocabulary) -> LentClasses | None:
    """What classes take from the checkpoint `source` of train.init_from; None where there is nothing to match.

    That is: the vocabularies are equal, the class head starts anew (--reinit-head), or it is made of text embeddings,
    which come from a file. UserError where no class has a counterpart.
    """
    saved = Vocabulary.load(source / VOCABULARY)
    if saved.digest == vocabulary.digest or config.train.reinit_head or config.model.class_embeddings is not None:
        return None
    tables = [MergeTable.load(said) for said in config.data.merge]
    lent = LentClasses(saved, vocabulary, match_classes(saved, vocabulary, tables), str(source))
    if not any(lent.lenders):
        raise UserError(
            f"the checkpoint was trained on vocabulary {saved.name!r} ({len(saved)} classes), the source has "
            f"{vocabulary.name!r} ({len(vocabulary)} classes), and no class of the one is in the other",
            where=str(source),
            remedy="Add --reinit-head, which takes all but its class head; or say in a merge table (data.merge) which "
            "classes are one: names are matched exactly.",
        )
    return lent


def class_images(sources: Sequence[Index]) -> list[int]:
    """Training images that hold each class, summed over the sources, [K]; repeats and sources' weights do not count."""
    return [int(images) for images in np.sum([index.class_counts() for index in sources], axis=0)]


def match_classes(
    saved: Vocabulary, vocabulary: Vocabulary, tables: Sequence[MergeTable] = ()
) -> tuple[tuple[int, ...], ...]:
    """For each class of `vocabulary` the labels of `saved` that it continues: the class of exactly its name, else those
    that were unified with it or that a row of a merge table declares to be the same class; none: empty."""
    by_name = {name: label for label, name in enumerate(saved.names)}
    by_meaning: dict[Meaning, list[int]] = {}
    for label in range(len(saved)):
        for meaning in _meanings(saved, label, tables):
            by_meaning.setdefault(meaning, []).append(label)

    def lenders(label: int, name: str) -> tuple[int, ...]:
        if name in by_name:
            return (by_name[name],)
        found = {old for meaning in _meanings(vocabulary, label, tables) for old in by_meaning.get(meaning, ())}
        return tuple(sorted(found))

    return tuple(lenders(label, name) for label, name in enumerate(vocabulary.names))


def lend_rows(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], lent: LentClasses, kind: str
) -> dict[str, Tensor]:
    """`given` with the tensors of the class head in the run's vocabulary: rows of lenders, else those of `own`.

    The row of no-object is the checkpoint's. Tensors that are not of one row a class are left as they are.
    """
    changed = dict(given)
    objects = len(lent.saved), len(lent.vocabulary)
    extra = int(kind == "mask_classification")
    for name in of_classes(own, kind):
        old, new = given.get(name), own[name].clone()
        if old is None or (len(old), len(new)) != (objects[0] + extra, objects[1] + extra):
            continue
        if old.shape[1:] != new.shape[1:]:
            continue
        for label, lenders in enumerate(lent.lenders):
            if lenders:
                new[label] = old[list(lenders)].mean(dim=0) if len(lenders) > 1 else old[lenders[0]]
        if extra:
            new[-1] = old[-1]
        changed[name] = new
    return changed


def of_classes(names: Collection[str], kind: str) -> list[str]:
    """The tensors that belong to the classes of one vocabulary: of a head by text embeddings the rows alone."""
    if CLASS_ROWS in names:
        return [CLASS_ROWS]
    return [name for name in names if name.startswith(CLASS_HEADS[kind])]


def refuse_other_rows(own: Mapping[str, Tensor], given: Mapping[str, Tensor], where: Path) -> None:
    """UserError where a run that goes on has other class embeddings than it was trained with."""
    rows, saved = own.get(CLASS_ROWS), given.get(CLASS_ROWS)
    if rows is not None and saved is not None and not torch.equal(rows, saved):
        raise UserError(
            "the run was trained with other class embeddings than model.class_embeddings has now",
            where=str(where),
            remedy="Restore the file, or start a new run_dir with train.init_from.",
        )


def _meanings(vocabulary: Vocabulary, label: int, tables: Sequence[MergeTable]) -> Iterator[Meaning]:
    """What a class is: classes that it was made of, and rows of merge tables that speak of them or have its name."""
    name = vocabulary.names[label]
    members = vocabulary.members[label] if vocabulary.members else ((vocabulary.name, name),)
    yield from members
    for table in tables:
        for row in table.rows:
            unified = table.rename.get(row.name, row.name)
            if name in (row.name, unified) or any(own in row.members.get(whose, ()) for whose, own in members):
                yield unified


def _whose(name: str, lenders: Sequence[str]) -> str:
    return "" if list(lenders) == [name] else f" (from {' + '.join(lenders)})"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "none"
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN:,} more"
