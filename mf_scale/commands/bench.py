"""`mf-scale bench`: measurements with a peer in the same run."""

from __future__ import annotations

import argparse
from typing import Any

from mf_scale.commands.arguments import OVERRIDES, add_command, add_processes, count, wanted_ranks


def add(commands: Any) -> None:
    """Its parts and their arguments."""
    text = "measure a part against its peers, in one process"
    parts = commands.add_parser("bench", help=text, description=text, allow_abbrev=False)
    parts = parts.add_subparsers(metavar="PART", required=True)
    _add_loss(parts)
    _add_classes(parts)
    _add_save(parts)
    _add_data(parts)
    _add_index(parts)
    _add_claim(parts)


def _add_loss(parts: Any) -> None:
    command = add_command(parts, "loss", "matching and mask losses, from the embeddings", _run_loss)
    _add_counts(
        command,
        ("images", 2, "images of the batch"),
        ("queries", 100, "queries"),
        ("segments", 15, "segments of each image"),
        ("cells", 128, "height and width of the mask logits"),
        ("size", 512, "height and width of the segment map"),
        ("layers", 6, "supervised decoder layers"),
        ("channels", 256, "channels of the embeddings"),
        ("classes", 150, "classes"),
        ("repeats", 3, "rounds, alternating between the contestants, after one that warms up"),
    )
    command.add_argument("--threads", type=count, metavar="N", help="threads on a CPU (default: torch's)")
    command.add_argument("--reference", action="store_true", help="measure the plain reference too (slow)")
    command.add_argument("--json", metavar="FILE", help="write all numbers there")


def _add_classes(parts: Any) -> None:
    command = add_command(
        parts, "classes", "class terms of a step and semantic inference, by the number of classes", _run_classes
    )
    command.add_argument(
        "--classes", type=count, nargs="+", default=[133, 847], metavar="K", help="to measure (default: 133 847)"
    )
    _add_counts(
        command,
        ("images", 16, "images of the step"),
        ("layers", 6, "supervised decoder layers"),
        ("queries", 100, "queries"),
        ("segments", 20, "segments of each image of the step"),
        ("width", 256, "channels of all embeddings"),
        ("size", 512, "height and width of the image that is segmented"),
        ("budget", 64, "MiB for inference, as eval.memory_budget"),
        ("repeats", 3, "rounds, alternating between the ways, after one that warms up"),
    )
    command.add_argument("--threads", type=count, metavar="N", help="threads on a CPU (default: torch's)")
    command.add_argument("--json", metavar="FILE", help="write all numbers there")


def _add_save(parts: Any) -> None:
    command = add_command(
        parts, "save", "a checkpoint's save: behind the training, before it, by safetensors", _run_save
    )
    _add_counts(
        command,
        ("millions", 45, "millions of parameters, 12 bytes each (45: MaskFormer with a Swin-T)"),
        ("repeats", 3, "rounds, alternating between the ways, after one that warms up"),
    )
    command.add_argument("--folder", metavar="DIR", help="on the disk to be measured (default: the temporary folder)")
    command.add_argument("--json", metavar="FILE", help="write all numbers there")


def _add_data(parts: Any) -> None:
    command = add_command(parts, "data", "bytes to training samples on one core, and raw samples from tars", _run_data)
    command.add_argument("--source", metavar="DIR", help="packed source to measure on (default: made images)")
    _add_counts(
        command,
        ("images", 200, "images that go through in a round"),
        ("repeats", 5, "rounds, alternating between the ways, after one that warms up"),
    )
    command.add_argument(
        "--crop", type=count, nargs="+", default=[512, 640], metavar="N", help="crops to measure (default: 512 640)"
    )
    command.add_argument("--json", metavar="FILE", help="write all numbers there")


def _add_index(parts: Any) -> None:
    command = add_command(
        parts, "index", "an index at scale: opening it, memory, one step's plan early and late", _run_index
    )
    _add_counts(
        command,
        ("samples", 1_000_000, "samples of the index, which is made up for the purpose: 85 bytes each on the disk"),
        ("classes", 1000, "classes, with a long tail"),
        ("global-batch", 512, "samples of a global batch"),
        ("ranks", 8, "ranks whose shares are simulated"),
        ("workers", 8, "loader workers of a rank"),
        ("peer-samples", 1_000_000, "the most that the peer's list takes into memory"),
    )
    command.add_argument("--folder", metavar="DIR", help="where the index is made (default: the temporary folder)")
    command.add_argument("--json", metavar="FILE", help="write all numbers there")


def _add_claim(parts: Any) -> None:
    text = "per-pixel, per-pixel+ and mask classification, trained and evaluated alike, several seeds"
    command = add_command(parts, "claim", text, _run_claim)
    command.add_argument("config", metavar="CONFIG", help="for example configs/experiments/claim.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    command.add_argument("--folder", metavar="DIR", required=True, help="the experiment's; the same command goes on")
    command.add_argument(
        "--source", metavar="DIR", action="append", required=True, help="packed source; several are taken together"
    )
    command.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="seeds to train (default: 0 1 2)"
    )
    command.add_argument(
        "--rates", type=float, nargs="+", default=[], metavar="LR", help="other learning rates to try, first seed"
    )
    _add_counts(
        command,
        ("held-out", 100, "images that are not trained on but evaluated, other ones with each seed"),
        ("rare", 2, "training images up to which a class is rare"),
        ("common", 5, "training images up to which a class is common"),
        ("minutes", 120, "that one training or evaluation may take"),
    )
    add_processes(command)


def _add_counts(command: argparse.ArgumentParser, *arguments: tuple[str, int, str]) -> None:
    for name, default, text in arguments:
        command.add_argument(f"--{name}", type=count, default=default, metavar="N", help=f"{text} (default: {default})")


def _run_loss(options: argparse.Namespace, _: list[str]) -> int:
    import torch

    from mf_scale.bench.inputs import Shape
    from mf_scale.bench.loss import bench_loss

    if options.threads:
        torch.set_num_threads(options.threads)
    shape = Shape(**{name: getattr(options, name) for name in Shape.__dataclass_fields__})
    print(bench_loss(shape, repeats=options.repeats, reference=options.reference, json_file=options.json))
    return 0


def _run_classes(options: argparse.Namespace, _: list[str]) -> int:
    import torch

    from mf_scale.bench.class_ways import Sizes
    from mf_scale.bench.classes import bench_classes

    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes.__dataclass_fields__})
    print(bench_classes(sizes, options.classes, repeats=options.repeats, json_file=options.json))
    return 0


def _run_save(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.bench.save import bench_save

    print(bench_save(options.millions, repeats=options.repeats, folder=options.folder, json_file=options.json))
    return 0


def _run_data(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.bench.data import bench_data

    counts = {"images": options.images, "crops": options.crop, "repeats": options.repeats}
    print(bench_data(options.source, **counts, json_file=options.json))
    return 0


def _run_index(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.bench.index_scale import Scale, bench_index

    scale = Scale(**{name: getattr(options, name) for name in Scale.__dataclass_fields__})
    print(bench_index(scale, folder=options.folder, json_file=options.json))
    return 0


def _run_claim(options: argparse.Namespace, _: list[str]) -> int:
    from mf_scale.training.preemption import install_handlers

    stops = install_handlers().signals
    from pathlib import Path

    from mf_scale.bench.claim import Asked, run_claim
    from mf_scale.bench.claim_split import Bands

    names = ("config", "overrides", "seeds", "rates", "held_out", "minutes")
    told = {name: getattr(options, name) for name in names}
    told["processes"] = wanted_ranks(options.processes)
    bands, folder = Bands(options.rare, options.common), Path(options.folder)
    print(run_claim(Asked(**told, sources=options.source, folder=folder, bands=bands), stops))
    return 0
