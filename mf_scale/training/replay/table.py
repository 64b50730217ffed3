"""What a replay found, as a person reads it."""

from __future__ import annotations

from mf_scale.training.guard import shown_keys
from mf_scale.training.replay.look import Replayed, ReplayedStep
from mf_scale.training.replay.plan import ReplayPlan


def headline(plan: ReplayPlan, *, catching_up: bool) -> str:
    """Which batch with which weights, before it is run."""
    samples = plan.data.at(plan.step - 1).global_batch
    cut = plan.cut
    accumulated = samples // (cut.world * cut.micro_batch)
    weights = plan.checkpoint.name if plan.checkpoint else "those the run started with (no checkpoint before this step)"
    if plan.behind:
        way = "that are trained first" if catching_up else "that --catch-up would train first"
        weights += f", {_steps(plan.behind)} back {way}"
    lines = [
        f"step {plan.step} of {plan.run.path}: global batch {plan.step - 1}, {samples} samples = {cut.micro_batch} x "
        f"{accumulated} accumulated x {cut.world} ranks, {plan.config.train.precision}",
        f"weights: {weights}",
        _recorded(plan),
    ]
    return "\n".join(lines)


def _recorded(plan: ReplayPlan) -> str:
    event = plan.recorded
    if event is None:
        return "the run recorded nothing against this step"
    if event.get("reason") != "loss":
        return "the run recorded: gradients were not finite, no update"
    terms = "; ".join(f"rank {entry['rank']}: {', '.join(entry['terms'])}" for entry in event.get("ranks", []))
    return f"the run recorded: the loss was not finite ({terms}), no update"


def tables(plan: ReplayPlan, step: ReplayedStep, *, catching_up: bool) -> str:
    """One line a micro-batch, one a parameter group, what was found, and what follows."""
    names = next((list(part.terms) for part in step.parts if part.terms), [])
    rows = [["rank", "micro-batch", *names, "loss", "gradient", "finite", "samples"]]
    rows += [_row(part, names) for part in step.parts]
    totals = {name: sum(part.terms.get(name, float("nan")) for part in step.parts) for name in names}
    rows.append(["all", "", *(_number(v) for v in totals.values()), _number(sum(totals.values())), "", "", ""])
    groups = [["parameter group", "gradient"], *([n, _number(norm)] for n, norm in step.group_norms.items())]
    lines = [_aligned(rows), "", _aligned(groups)]
    if step.bad_weights:
        lines += ["", f"not finite in the weights before the step: {shown_keys(step.bad_weights)}"]
    found = [(part.micro, finding) for part in step.parts for finding in part.findings]
    lines += ["", *(f"rank {m.rank}, micro-batch {m.number}: {finding}" for m, finding in found)] if found else []
    return "\n".join([*lines, "", _verdict(plan, step, catching_up=catching_up)])


def _row(part: Replayed, names: list[str]) -> list[str]:
    terms = [part.terms.get(name, float("nan")) for name in names]
    numbers = [_number(value) for value in (*terms, sum(terms), part.norm)]
    keys = shown_keys(part.micro.batch.keys)
    return [str(part.micro.rank), str(part.micro.number), *numbers, "yes" if part.finite else "NO", keys]


def _number(value: float) -> str:
    return f"{value:.6g}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _verdict(plan: ReplayPlan, step: ReplayedStep, *, catching_up: bool) -> str:
    if not step.finite:
        bad = sum(not part.finite for part in step.parts)
        return f"Reproduced: {bad} of {len(step.parts)} micro-batches are not finite; the run makes no update here."
    verdict = "Not reproduced: loss and gradients of this step are finite here."
    if plan.behind and not catching_up:
        verdict += f" The weights are {_steps(plan.behind)} older than the run's were: try --catch-up."
    return verdict


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
