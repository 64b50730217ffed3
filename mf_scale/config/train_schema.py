"""The configuration of the run itself: optimizer, schedule, steps, guards, ZeRO, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from mf_scale.config.model_schema import choice


@dataclass
class OptimizerConfig:
    """AdamW with parameter groups."""

    lr: float = 1e-4
    """Learning rate of everything but the backbone (paper: 1e-4 with ResNets, 6e-5 with Swin)."""
    backbone_multiplier: float = 0.1
    """Factor on the backbone's learning rate (paper: 0.1 with ResNets, 1.0 with Swin)."""
    weight_decay: float = 1e-4
    """Decoupled weight decay; norms and embeddings have none (paper: 1e-4 with ResNets, 0.01 with Swin)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's moment factors (paper: torch's defaults)."""
    eps: float = 1e-8
    """Adam's epsilon (torch's default)."""
    clip_norm: float = 0.01
    """Global L2 norm that gradients are clipped to; 0 does not clip (paper: 0.01)."""


@dataclass
class ScheduleConfig:
    """Learning-rate factor as a pure function of the update count."""

    name: str = choice("poly", "step", "constant")
    """poly: (1 - update / steps) ** power; step: times gamma at each milestone; constant."""
    power: float = 0.9
    """Exponent of poly (paper: 0.9)."""
    milestones: list[int] = field(default_factory=list)
    """Updates at which step multiplies by gamma (paper: 369,600 of 554,400 on COCO)."""
    gamma: float = 0.1
    """Factor of step (paper: 0.1)."""
    warmup_updates: int = 0
    """Updates of linear warm-up (paper: 0 with ResNets, 1500 with Swin)."""
    warmup_start: float = 1e-6
    """Factor at the first update of the warm-up (paper: 1e-6)."""


@dataclass
class TrainConfig:
    """The run: how long, how large a step, which precision."""

    steps: int = 160_000
    """Global batches to train on (paper: 160k on ADE20K)."""
    global_batch: int = 16
    """Samples of a step, over all ranks (paper: 16)."""
    micro_batch: int = 2
    """Samples per rank per forward, at most: a rank's share of the global batch that it does not divide is cut by the
    largest divisor below. Accumulation = global_batch / (micro-batch x world size)."""
    precision: str = choice("bf16", "fp32", "fp16")
    """bf16, fp16: autocast over fp32 parameters; fp16 with a dynamic loss scale. Losses and matching: always fp32."""
    tf32: bool = True
    """CUDA: products and convolutions in fp32 round their inputs to TF32's 10 bits (about 3e-4), much faster."""
    deterministic: bool = False
    """Refuse what is not reproducible bit by bit, and switch off what is faster but not; the start says what."""
    init_from: Optional[str] = None
    """Run directory, checkpoint or export whose weights start a new run (weights only; resuming needs no argument)."""
    reinit_head: bool = False
    """With init_from: allow another vocabulary and start the class head anew (also as the option --reinit-head)."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    collective_timeout: int = 900
    """Seconds a rank waits for its peers in one collective before it gives the run up."""
    hang_timeout: int = 600
    """Seconds without a sign of life after which a rank writes its stacks into the run directory and ends; 0: never."""
    stop_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGUSR1", "SIGINT"])
    """Signals that ask the run to commit its state and stop (exit code 85)."""
    stop_before: float = 2.0
    """Minutes before the end of a SLURM job (SLURM_JOB_END_TIME) at which the run stops by itself; 0: does not."""
    gc_every: int = 500
    """Steps between Python's garbage collections, which all ranks take together; 0 leaves them to Python."""
    straggler_every: int = 100
    """Steps over which the ranks' own seconds are compared, to name one that the others wait for; 0: never (100: one
    image with many segments, or one slow read, is no more than a hundredth of the mean)."""
    straggler_factor: float = 1.3
    """Times the median of the other ranks' own seconds a step from which a rank is named, where it costs the others 5%
    of a step (1.3: which images a rank happens to get makes some 10% over a hundred steps)."""
    profile: list[int] = field(default_factory=list)
    """[first, last]: steps, from 1, that torch's profiler records into RUN/profile; empty: none (it slows them)."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that `profile` records, each into files of its own (0: all do the same; or one that a straggler event
    names)."""


@dataclass
class GuardConfig:
    """What ends or turns back a run that goes wrong."""

    skipped_in_a_row: int = 20
    """Steps without an update (non-finite loss or gradients) in a row at which the run stops."""
    skipped_share: float = 0.1
    """Share of the last `window` steps without an update at which the run stops; 0: only those in a row count."""
    window: int = 500
    """Steps that `skipped_share` looks back over."""
    spike_factor: float = 0.0
    """A loss above this many times the median of the last `spike_window` goes back to the last checkpoint; 0: none."""
    spike_window: int = 100
    """Steps whose losses make the median, and that must have been taken before the guard is on."""
    spike_skip: int = 10
    """Global batches left out around a spike: half of them before the one it came with."""
    spike_rollbacks: int = 3
    """Times a run goes back, in its whole life, before it stops instead."""


@dataclass
class EmaConfig:
    """An exponential moving average of the weights."""

    decay: float = 0.0
    """Share that is kept at each update; 0: no average (paper: none). Ramps up as (1 + updates) / (10 + updates)."""


@dataclass
class ZeroConfig:
    """What DeepSpeed partitions over the ranks."""

    stage: int = field(default=2, metadata={"choices": (0, 1, 2, 3)})
    """0: nothing; 1: optimizer states; 2: gradients too; 3: parameters too."""
    offload_optimizer: bool = False
    """Keep this rank's optimizer states in host memory and update there (stages 1 to 3)."""
    offload_parameters: bool = False
    """Keep this rank's parameters in host memory between uses (stage 3)."""
    bucket_mib: int = 128
    """MiB of gradients reduced at once."""


@dataclass
class CheckpointConfig:
    """Committed checkpoints in the run directory."""

    every_steps: int = 5000
    """Steps between checkpoints; 0: none by steps. One is always committed at the end and at a stop."""
    every_minutes: float = 15.0
    """Minutes between checkpoints; 0: none by time. What a lost node costs at most."""
    keep_last: int = 3
    """Newest checkpoints kept; at least 2, since the newest may be found damaged."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good; 0: none."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss as well."""
    asynchronous: bool = True
    """Write behind the training, which waits for a copy into host memory only; false: wait for the commit."""


@dataclass
class LaunchConfig:
    """How launch/multinode.sh brings a run back. Further: a newer checkpoint, or a step that no start had reached."""

    fruitless_starts: int = 5
    """Starts in a row that brought the run no further after which a SLURM job is not requeued any more."""
