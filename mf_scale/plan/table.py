"""Several plans, a line each."""

from __future__ import annotations

from collections.abc import Sequence

from mf_scale.plan.planning import Plan
from mf_scale.plan.sizes import GIB


def table(plans: Sequence[Plan]) -> str:
    """Several configurations; with what fits where a memory was given."""
    wide = max(len(plan.file) for plan in plans) + 2
    ranks, fitted = plans[0].ranks, any(plan.fit for plan in plans)
    head = f"{'configuration':<{wide}}{'image':>10}{'classes':>8}{'param M':>9}{'train M':>9}{'GFLOP':>9}"
    head += f"{'batch':>7}{'micro x acc.':>14}{'steps':>9}{'images':>13}{'GiB':>7}"
    lines = [head + (f"{'with act.':>11}{'fits':>18}" if fitted else "")]
    for plan in plans:
        config, total = plan.config, plan.total
        batch = f"{plan.cut.micro_batch} x {plan.cut.accumulation}" if plan.cut else "not cut"
        height, width = config.data.crop
        line = (
            f"{plan.file:<{wide}}{f'{height}x{width}':>10}{config.model.num_classes:>8}"
            f"{total.parameters / 1e6:>9.1f}{total.trainable / 1e6:>9.1f}{total.flops / 1e9:>9.1f}"
            f"{config.train.global_batch:>7}{batch:>14}{config.train.steps:>9,}"
            f"{plan.duration.images:>13,}{plan.states.gpu.total / GIB:>7.2f}"
        )
        lines.append(line + (f"{_most(plan):>11}{_choice(plan):>18}" if fitted else ""))
    lines += [
        f"GFLOP: 2 x multiply-accumulate, forward, one image. Batch and GiB: for {ranks} ranks; GiB: what a GPU holds",
        "at the configured ZeRO stage (computed, without activations"
        + ("; with act.: with those of one micro-batch)." if fitted else ")."),
    ]
    if fitted:
        lines.append("Fits: the smallest ZeRO stage and its largest micro-batch that fit into the memory given.")
    return "\n".join(lines)


def _most(plan: Plan) -> str:
    own = next((need for need in plan.needs if need.states.layout == plan.states.layout), None)
    return f"{own.total / GIB:.2f}" if own else ""


def _choice(plan: Plan) -> str:
    if plan.fit is None:
        return ""
    if plan.fit.choice is None:
        return "nothing fits"
    layout = plan.fit.choice.states.layout
    away = "+off" if layout.offload_optimizer or layout.offload_parameters else ""
    return f"stage {layout.stage}{away}, up to {plan.fit.micro_batch}"
