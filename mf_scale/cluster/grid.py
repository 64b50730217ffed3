"""A grid of runs: a YAML file that says which keys of the configuration vary, and the name of each run. Pure but for
reading the file.

    optimizer.lr: [1e-4, 6e-5]          every combination: four runs
    model.backbone.name: [resnet50, swin_tiny_patch4_window7_224]

    - {optimizer.lr: 1e-4}              or one run a line: two runs
    - {optimizer.lr: 6e-5, schedule.warmup_updates: 1500}

A name is made of the run's own keys and values alone, so that it stays when the grid grows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mf_scale.config.explain import did_you_mean, schema_fields
from mf_scale.config.load import is_overridden, load_config
from mf_scale.config.schema import Config
from mf_scale.config.validate import validate
from mf_scale.errors import UserError

OWN_KEYS = {"run_dir": "every run gets its own, named after what varies"}
"""Keys that the sweep sets itself."""
MOST_RUNS = 1001
"""SLURM's default limit of an array."""
_LONGEST_VALUE, _LONGEST_NAME = 24, 96
_FREE_FORM = ("deepspeed.",)
"""Sections whose keys are not in the schema."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Run:
    """One run of a grid."""

    name: str
    values: Mapping[str, Any]
    """Key -> value, of the keys that vary."""

    def overrides(self) -> list[str]:
        """The values as key=value of the command line."""
        # JSON is YAML, and says of every value what it is: text that looks like a number stays text.
        return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in self.values.items()]


def read_grid(file: Path) -> list[Run]:
    """The runs of a grid file, in its order (the last key of a product varies fastest); raises UserError."""
    rows = _rows(_read(file), str(file))
    problems = [sentence for key in dict.fromkeys(itertools.chain(*rows)) if (sentence := _wrong_key(key))]
    if problems:
        raise UserError(" ".join(problems), where=str(file), remedy="Nothing was started.")
    if len(rows) > MOST_RUNS:
        raise UserError(
            f"the grid has {len(rows):,} runs, an array of SLURM {MOST_RUNS:,} at most",
            where=str(file),
            remedy="Cut it into several files.",
        )
    runs = [Run(run_name(row), row) for row in rows]
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        numbers = [str(n) for n, run in enumerate(runs) if run.name == twice[0]]
        raise UserError(f"runs {' and '.join(numbers)} are the same: {twice[0]}", where=str(file))
    return runs


def check_runs(runs: Sequence[Run], file: Path, config: Path, overrides: Sequence[str]) -> str:
    """Hold the configuration of every run to all rules that need no data; the folder of the sweep. Raises UserError."""
    given = [key for key in dict.fromkeys(itertools.chain(*(run.values for run in runs)))
             if is_overridden(overrides, key)]  # fmt: skip
    if given:
        raise UserError(f"{given[0]} varies in the grid, and is given as well", where=f"{file}, command line")
    root = load_config(config, overrides).run_dir
    for number, run in enumerate(runs):
        try:
            validate(run_config(run, config, overrides))
        except UserError as error:
            where = f"{file}, run {number}: {run.name}"
            raise UserError(error.what, where=where, remedy=error.remedy) from error
    return root


def run_config(run: Run, config: Path, overrides: Sequence[str]) -> Config:
    """The configuration of one run; raises UserError."""
    return load_config(config, [*overrides, *run.overrides()])


def run_name(values: Mapping[str, Any]) -> str:
    """A name for a folder: short, safe in every file system and shell, different for different values."""
    parts = [f"{_label(key)}-{_text(value)}" for key, value in values.items()]
    name = "_".join(parts)
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 9].rstrip('-_.')}-{_digest(dict(values), 8)}"
    return name


def _read(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("the grid file does not exist", where=str(file)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the grid file cannot be read: {error}", where=str(file)) from error
    except yaml.YAMLError as error:
        raise UserError(f"the grid file is not YAML: {' '.join(str(error).split())}", where=str(file)) from error


def _rows(data: Any, where: str) -> list[dict[str, Any]]:
    shape = "Write `key: [value, value]` lines, or a list of `{key: value}`."
    if isinstance(data, Mapping) and data:
        for key, values in data.items():
            if isinstance(values, Mapping):
                inner = next(iter(values), "key")
                raise UserError(
                    f"{key} is a section", where=where, remedy=f"Write the whole key: {key}.{inner}: [value, value]."
                )
            if not isinstance(values, list) or not values:
                raise UserError(f"{key} must hold a list of values, not {values!r}", where=where, remedy=shape)
        choices = itertools.product(*(values for values in data.values()))
        return [_row(dict(zip(data, choice, strict=True))) for choice in choices]
    if isinstance(data, list) and data and all(isinstance(row, Mapping) and row for row in data):
        return [_row(row) for row in data]
    raise UserError("the grid names no runs", where=where, remedy=shape)


def _row(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """YAML reads 1e-4 as text, since there is no point in it; the configuration's own reader does not."""
    if isinstance(value, str) and _NUMBER.fullmatch(value) and "e" in value.lower():
        return float(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _wrong_key(key: str) -> str | None:
    if key in OWN_KEYS:
        return f"{key} cannot vary: {OWN_KEYS[key]}."
    known = dict(schema_fields())
    if key in known or key.startswith(_FREE_FORM):
        return None
    if any(name.startswith(f"{key}.") for name in known):
        return f"{key} is a section: write the whole key, for example {key}.{_first_of(key, known)}."
    return f"{key} is not a key.{did_you_mean(key)}"


def _first_of(section: str, known: Mapping[str, Any]) -> str:
    return next(name for name in known if name.startswith(f"{section}.")).removeprefix(f"{section}.")


def _label(key: str) -> str:
    """The last part of a key where no other key of the configuration ends so, else the whole."""
    last = key.rpartition(".")[2]
    alike = [name for name, _ in schema_fields() if name.rpartition(".")[2] == last]
    return _safe(last if alike == [key] else key)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, int | float):
        return _safe(f"{value:g}" if float(f"{value:g}") == value else repr(value))
    if isinstance(value, list) and len(value) > 1 and all(type(item) in (int, float) for item in value):
        text = "x".join(_text(item) for item in value)
        return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}-{_digest(value, 6)}"
    text = value if isinstance(value, str) else json.dumps(value)
    short = _safe(text)[:_LONGEST_VALUE].strip("-.")
    looks_else = _NUMBER.match(text) is not None or text in ("true", "false", "none", "")
    return short if short == text and not looks_else else f"{short}-{_digest(value, 6)}".lstrip("-")


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text)


def _digest(value: Any, length: int) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
