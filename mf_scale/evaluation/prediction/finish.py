"""Once every part is committed: the quarantine list, COCO's files of everything, and what is told. No torch here.

Whichever process ends last does it; two that end at once write the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from mf_scale.errors import EXIT_USER, UserError
from mf_scale.evaluation.prediction.claims import sweep
from mf_scale.evaluation.prediction.commits import books_of, part_name
from mf_scale.evaluation.prediction.plan import QUARANTINE, SUMMARY, mark
from mf_scale.evaluation.prediction.words import PARTS, counted
from mf_scale.rundir import disk_errors, read_json, write_atomically

MOST_MERGED = 100_000
"""Images up to which COCO's files of everything are written unasked: their readers hold them in memory."""
TOLD = 10
"""Quarantined images that are told one by one."""
INFO = ("id", "category_id", "area", "bbox", "iscrowd", "score")
"""Of a segment in COCO's segments_info; the score is ours."""


def finish(folder: Path, plan: dict[str, Any], parts: int, merge: bool | None) -> dict[str, Any]:
    """Write what belongs to all parts, unless it is there; the summary."""
    if (folder / SUMMARY).exists():
        before = read_json(folder / SUMMARY)
        if before["merged"] or not merge:
            return before
    books = books_of(folder, plan["layout"])
    summary: dict[str, Any] = {"images": 0, "quarantined": 0, "empty": 0, "without_segments": []}
    for part in range(parts):
        commit = read_json(books / part_name(part, "json"))
        for name in summary:
            summary[name] += commit[name]
        summary["without_segments"] = summary["without_segments"][:5]
    if summary["quarantined"]:
        _write(folder / QUARANTINE, lambda file: _copy(books, parts, file))
    sweep(books)
    merged = summary["images"] <= MOST_MERGED if merge is None else merge
    summary["merged"] = merge_coco(folder, books, parts, plan) if merged else []
    write_atomically(folder / SUMMARY, json.dumps(summary, ensure_ascii=False), mark=mark())
    return summary


def merge_coco(folder: Path, books: Path, parts: int, plan: dict[str, Any]) -> list[str]:
    """COCO's files of all parts, written in one pass over their lines for each list; their names."""
    task, categories = plan["task"], plan["categories"]

    def images() -> Iterator[dict[str, Any]]:
        for record in records(books, parts):
            yield {"id": record["image_id"], "file_name": record["image"]} | {
                side: record[side] for side in ("height", "width")
            }

    if task == "instance":
        _write(folder / "images.json", lambda file: _object(file, {"images": images(), "categories": categories}))
        _write(folder / "instances.json", lambda file: _list(file, _results(records(books, parts))))
        return ["instances.json", "images.json"]
    annotations = (
        {"image_id": r["image_id"], "file_name": r["map"], "segments_info": [_info(s) for s in r["segments"]]}
        for r in records(books, parts)
    )
    lists = {"images": images(), "annotations": annotations, "categories": categories}
    _write(folder / f"{task}.json", lambda file: _object(file, lists))
    return [f"{task}.json"]


def records(books: Path, parts: int) -> Iterator[dict[str, Any]]:
    """The lines of all parts, in the order of the input."""
    for part in range(parts):
        with (books / part_name(part, "jsonl")).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def tell(folder: Path, plan: dict[str, Any], summary: dict[str, Any]) -> int:
    """Say what became of the images; the exit code: 2 where some were a mistake of the user's."""
    done, all_of_them = summary["images"] - summary["quarantined"], summary["images"]
    where = "part-*.tar and part-*.jsonl in " if plan["layout"] == PARTS else ""
    merged = f"; COCO's format: {', '.join(summary['merged'])}" if summary["merged"] else ""
    print(f"{done:,} of {all_of_them:,} images predicted into {where}{folder}{merged}")
    if summary["empty"]:
        named = ", ".join(summary["without_segments"])
        print(f"no segment was found in {summary['empty']:,} of them ({plan['limits']}): {named}")
    if not summary["quarantined"]:
        return 0
    with (folder / QUARANTINE).open(encoding="utf-8") as file:
        for line, _ in zip(file, range(TOLD), strict=False):
            bad = json.loads(line)
            print(f"mf-scale: {UserError(bad['reason'], where=bad['where'], remedy=bad['remedy'])}", file=sys.stderr)
    were = (
        f"{counted(summary['quarantined'], 'image')} {'was' if summary['quarantined'] == 1 else 'were'} not predicted"
    )
    more = f"{were}; with {'its reason' if summary['quarantined'] == 1 else 'all reasons'}: {folder / QUARANTINE}"
    print(f"mf-scale: {more}", file=sys.stderr)
    return EXIT_USER


def thresholds_of(task: str, settings: Any) -> str:
    """The limits below which a task drops what it finds."""
    names = {"instance": ["instance_threshold"], "panoptic": ["object_threshold", "overlap_threshold"]}.get(task, [])
    return ", ".join(f"eval.{name}={getattr(settings, name):g}" for name in names)


def _info(segment: dict[str, Any]) -> dict[str, Any]:
    return {name: segment[name] for name in INFO if name in segment}


def _results(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """COCO's results: one entry an instance. Without boxes: their readers would take the box's area for the mask's."""
    for record in lines:
        for found in record["segments"]:
            named = ("category_id", "score", "segmentation")
            yield {"image_id": record["image_id"], **{name: found[name] for name in named}}


def _copy(books: Path, parts: int, file: IO[str]) -> None:
    for part in range(parts):
        path = books / part_name(part, "quarantine.jsonl")
        if read_json(books / part_name(part, "json"))["quarantined"]:
            with path.open(encoding="utf-8") as lines:
                file.writelines(lines)


def _object(file: IO[str], lists: dict[str, Iterable[dict[str, Any]]]) -> None:
    for number, (name, items) in enumerate(lists.items()):
        file.write(("{" if number == 0 else ",\n") + json.dumps(name) + ": ")
        _list(file, items)
    file.write("}\n")


def _list(file: IO[str], items: Iterable[dict[str, Any]]) -> None:
    file.write("[")
    for number, item in enumerate(items):
        file.write(("\n" if number == 0 else ",\n") + json.dumps(item, ensure_ascii=False))
    file.write("]")


def _write(path: Path, fill: Callable[[IO[str]], None]) -> None:
    """A file that is whole or not there, filled bit by bit."""
    partial = path.with_name(f".{path.name}.{mark()}")
    with disk_errors(path):
        with partial.open("w", encoding="utf-8") as file:
            fill(file)
        partial.replace(path)
