"""The measurements as a table to read."""

from __future__ import annotations

from typing import Any

_COLUMNS = (
    ("cost", "cost_ms", ".1f"),
    ("solve", "solve_ms", ".1f"),
    ("loss", "loss_ms", ".1f"),
    ("forward", "forward_ms", ".1f"),
    ("backward", "backward_ms", ".1f"),
    ("total ms", "total_ms", ".1f"),
    ("no solve", "without_solve_ms", ".1f"),
    ("peak MiB", "peak_mib", ".1f"),
    ("faster", "faster", ".1fx"),
    ("smaller", "smaller", ".1fx"),
    ("loss off", "loss_difference", ".0e"),
    ("grad off", "gradient_difference", ".0e"),
)
_ON_A_GPU = (("launches", "launches", "d"), ("syncs", "syncs", "d"), ("of floor", "of_floor", ".0%"))
_WIDTH = 9


def table(summary: dict[str, Any]) -> str:
    """What `bench_loss` sums up, for people."""
    shape, results, floor = summary["shape"], summary["results"], summary.get("floor")
    columns = _COLUMNS if floor is None else (*_COLUMNS, *_ON_A_GPU)
    lines = [
        f"{shape['images']} images, {shape['queries']} queries, {shape['segments']} segments, "
        f"{shape['cells']}->{shape['size']}, {shape['layers']} layers, from the embeddings · {summary['device']} · "
        f"median of {summary['repeats']}",
        " " * 16 + "".join(f"{title:>{_WIDTH}}" for title, _, _ in columns),
    ]
    for name, result in results.items():
        cells = "".join(f"{_cell(result.get(key), form):>{_WIDTH}}" for _, key, form in columns)
        lines.append(f"{name:<16}{cells}")
    lines.append(
        "forward contains cost, solve and loss; no solve: cost, loss and backward; faster and smaller: against "
        f"transformers; off: against {summary['truth']}"
    )
    lines.append(_small(summary))
    if floor is not None:
        lines.append(_floor(floor))
    if summary["absent"]:
        lines.append(f"not measured: {summary['absent']}")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form.removesuffix("x")) + "x" * form.endswith("x")


def _small(summary: dict[str, Any]) -> str:
    """One line on the agreement with the truth, loss and gradient."""
    shape = summary["small_shape"]
    found = [
        f"{name} {r['small']['loss_difference']:.0e} {r['small']['gradient_difference']:.0e}"
        for name, r in summary["results"].items()
    ]
    size = f"{shape['images']} images, {shape['cells']}->{shape['size']}, {shape['layers']} layers"
    return f"off the plain reference in fp64 ({size}; loss, gradient): {'; '.join(found)}"


def _floor(floor: dict[str, Any]) -> str:
    if "absent" in floor:
        return f"floor: not measured: {floor['absent']}"
    return (
        f"floor {floor['floor_ms']:.3f} ms: {floor['bytes'] / 1e9:.2f} GB at {floor['bytes_per_s'] / 1e12:.2f} TB/s, "
        f"{floor['transcendentals'] / 1e9:.2f} G transcendentals at {floor['transcendentals_per_s'] / 1e12:.2f} T/s, "
        "the longer of the two; both rates measured in this run; of floor: of no solve"
    )
