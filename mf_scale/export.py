"""A trained model for others: a folder without optimizer, a torch.export program, an ONNX file, a transformers folder.

Programs are loaded again and compared with the model before they appear under their name.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mf_scale.bundle import new_folder, refuse_used_folder, write_bundle
from mf_scale.errors import GuardError, UserError
from mf_scale.evaluation.loading import LoadedModel, load_model
from mf_scale.exchange import write_transformers_folder
from mf_scale.models.outputs import MaskPrediction
from mf_scale.rundir import VOCABULARY, disk_errors

TOLERANCE = 1e-4
"""Largest difference from the model that a program may have, as a share of the largest output (or of 1)."""
_LARGEST_PROTOBUF = 1_900_000_000
"""Bytes of weights above which ONNX keeps them in a file of their own: a protobuf ends at 2 GiB."""
_Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class _Traced:
    """A model as a program."""

    program: torch.export.ExportedProgram
    any_batch: bool
    """False: one image at a time."""


class _Tensors(nn.Module):
    """A model that answers with plain tensors, the mask logits multiplied out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images [B,3,H,W], RGB in 0..255 -> class_logits [B,Q,K+1] and mask_logits [B,Q,h,w]; or logits [B,K,h,w]."""
        prediction = self.model(images)
        if isinstance(prediction, MaskPrediction):
            masks = torch.einsum("bqc,bchw->bqhw", prediction.mask_embeddings, prediction.pixel_embeddings)
            return prediction.class_logits, masks
        return (prediction.logits(),)


def export_run(
    path: str, out: str | None, *, format: str, size: tuple[int, int] | None, overrides: Sequence[str]
) -> str:
    """Export a run or checkpoint into the new folder `out` (none: RUN/export…); what to tell the person.

    `format` is one of FORMATS; `size` (H, W) is that of a program's images, none: eval.short_side squared. Raises
    UserError for what does not fit, GuardError where a program's answers differ from the model's.
    """
    programs = format in _WRITERS
    if size is not None and not programs:
        raise UserError(
            f"--size does nothing with --format {format}, which takes images of any size",
            remedy=f"Leave it out, or use --format {' or '.join(_WRITERS)}.",
        )
    if format == "onnx":
        _check_onnx()
    # A program keeps torch's own attention, which runs wherever it is loaded.
    loaded = load_model(path, [*(["model.attention=auto"] if programs else []), *overrides], torch.device("cpu"))
    folder = Path(out) if out else _default_folder(loaded, format)
    refuse_used_folder(folder)
    if format == "safetensors":
        write_bundle(folder, loaded.model.state_dict(), loaded.config, loaded.vocabulary, loaded.step)
    elif format == "transformers":
        write_transformers_folder(loaded.model, loaded.config, loaded.vocabulary, folder)
    else:
        side = loaded.config.eval.short_side
        told = _export_program(loaded, folder, format, size or (side, side))
        return f"{told}\nexport: {folder}"
    return f"export: {folder}"


def _default_folder(loaded: LoadedModel, format: str) -> Path:
    if loaded.run_dir is None:
        raise UserError(
            "this checkpoint lies outside a run, so there is no place of its own for an export",
            where=str(loaded.checkpoint),
            remedy="Name a new folder: --out DIR.",
        )
    return loaded.run_dir / ("export" if format == "safetensors" else f"export-{format}")


def _export_program(loaded: LoadedModel, folder: Path, format: str, size: tuple[int, int]) -> str:
    """Trace, write, load again, compare; a sentence on what was written and how near it comes."""
    model = _Tensors(loaded.model).eval()
    names = ("class_logits", "mask_logits") if loaded.config.model.kind == "mask_classification" else ("logits",)
    with torch.no_grad(), _quiet():
        expected = [tuple(model(images)) for images in (_trial_images(size, 1), _trial_images(size, 2))]
        traced = _trace(model, size)
        with new_folder(folder) as place:
            file, run = _WRITERS[format](traced, place, names)
            tried = expected if traced.any_batch else expected[:1]
            difference = max(
                _compare(run(_trial_images(size, batch)), answers, names, format)
                for batch, answers in enumerate(tried, start=1)
            )
            batch = "batch" if traced.any_batch else 1
            shapes = {name: [batch, *answer.shape[1:]] for name, answer in zip(names, expected[0], strict=True)}
            described = {
                "format": format,
                "file": file.name,
                "step": loaded.step,
                "images": {"shape": [batch, 3, *size], "dtype": "float32", "values": "RGB, 0 to 255"},
                "stride": loaded.model.stride,  # of a cell in pixels; the last cells may reach beyond the image
                "outputs": shapes,
                "largest_difference": difference,
            }
            (place / "export.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
            vocabulary = json.dumps(loaded.vocabulary.to_dict(), indent=1, ensure_ascii=False)
            (place / VOCABULARY).write_text(vocabulary, encoding="utf-8")
    outputs = ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in shapes.items())
    return (
        f"{file.name}: images [{batch}, 3, {size[0]}, {size[1]}] (float32, RGB, 0 to 255) -> {outputs}\n"
        f"largest difference from the eager model {difference:.2g} of its largest output (tolerance {TOLERANCE:g})"
    )


def _trial_images(size: tuple[int, int], batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.rand((batch, 3, *size), generator=generator) * 255


def _trace(model: nn.Module, size: tuple[int, int]) -> _Traced:
    """The model as a program for images of one size, in batches of any number where its code allows."""
    try:
        dynamic = {"images": {0: torch.export.Dim("batch", min=1)}}
        traced = _Traced(torch.export.export(model, (_trial_images(size, 2),), dynamic_shapes=dynamic), True)
    except Exception:  # a model of the user's own may count its images in Python
        try:
            traced = _Traced(torch.export.export(model, (_trial_images(size, 1),)), False)
        except Exception as error:
            raise UserError(
                f"torch.export cannot trace the model: {_first_line(error)}",
                remedy="Use --format safetensors, or change the model's code.",
            ) from error
    for module in traced.program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    return traced


def _write_torch(traced: _Traced, place: Path, _: Sequence[str]) -> tuple[Path, _Run]:
    file, buffer = place / "model.pt2", io.BytesIO()
    torch.export.save(traced.program, buffer)
    with disk_errors(file):
        file.write_bytes(buffer.getvalue())
    return file, torch.export.load(file).module()


def _write_onnx(traced: _Traced, place: Path, names: Sequence[str]) -> tuple[Path, _Run]:
    file = place / "model.onnx"
    weights = sum(tensor.nbytes for tensor in traced.program.state_dict.values())
    try:
        onnx = torch.onnx.export(
            traced.program,
            dynamo=True,
            input_names=["images"],
            output_names=list(names),
            dynamic_shapes={"images": {0: "batch"}} if traced.any_batch else None,
            verbose=False,
        )
    except Exception as error:
        raise UserError(
            f"the model cannot be written as ONNX: {_first_line(error)}", remedy="Use --format torch or safetensors."
        ) from error
    assert onnx is not None, "the exporter gives a program"
    with disk_errors(file):
        onnx.save(file, external_data=weights > _LARGEST_PROTOBUF)
    from onnxruntime import InferenceSession

    session = InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return file, lambda images: [torch.from_numpy(a) for a in session.run(list(names), {"images": images.numpy()})]


_WRITERS: dict[str, Callable[[_Traced, Path, Sequence[str]], tuple[Path, _Run]]] = {
    "torch": _write_torch,
    "onnx": _write_onnx,
}
FORMATS = ("safetensors", *_WRITERS, "transformers")


def _compare(got: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str], format: str) -> float:
    """The largest difference as a share of the largest output (or of 1); GuardError above the tolerance."""
    shares = []
    for name, one, other in zip(names, got, expected, strict=True):
        difference, largest = float((one - other).abs().max()), float(other.abs().max())
        shares.append(difference / max(1.0, largest))
        if not shares[-1] <= TOLERANCE:  # neither is NaN
            raise GuardError(
                f"the {format} program answers otherwise than the model: {name} differs by up to {difference:.3g} "
                f"(the largest value is {largest:.3g}, the tolerance {TOLERANCE:g} of it)",
                remedy="Nothing was written. Use --format safetensors, and tell us of it.",
            )
    return max(shares)


def _check_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs packages that are not installed: {', '.join(missing)}",
            remedy='Install them: pip install "mf_scale[onnx]".',
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:300]}"


@contextmanager
def _quiet() -> Any:
    """Without the exporters' remarks to developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
