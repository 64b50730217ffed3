"""The configuration: one dataclass a section, a docstring under each field (unit, source of the default).

"Paper" is MaskFormer (Cheng et al., NeurIPS 2021) with its published training configurations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from mf_scale.config.model_schema import (
    BackboneConfig,
    DecoderConfig,
    ModelConfig,
    PixelDecoderConfig,
    PixelLevelConfig,
    choice,
)
from mf_scale.config.train_schema import (
    CheckpointConfig,
    EmaConfig,
    GuardConfig,
    LaunchConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    ZeroConfig,
)

__all__ = [
    "BackboneConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DecoderConfig",
    "EmaConfig",
    "EvalConfig",
    "GuardConfig",
    "LossConfig",
    "MatchingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PixelDecoderConfig",
    "PixelLevelConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TrackingConfig",
    "TrainConfig",
    "ZeroConfig",
]


@dataclass
class SourceConfig:
    """One of several training sources."""

    index: str = ""
    """Folder (or url prefix) of the source: tars and their index."""
    weight: float = 1.0
    """Its share of every global batch, relative to the other sources' (rounded to whole samples, printed)."""
    vocabulary: Optional[str] = None
    """The vocabulary it has to have: a name, or a vocabulary file; none: whatever it was packed with."""
    map: Any = None
    """Its class -> unified class, or null to leave it out: a mapping, or a JSON file of it (docs/vocabularies.md)."""


@dataclass
class DataConfig:
    """Where samples come from and how they become training samples."""

    train: Optional[str] = None
    """Folder (or url prefix) of the training source: tars and their index."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several training sources in place of `train`, each {index, weight, vocabulary, map}."""
    merge: list[str] = field(default_factory=list)
    """Merge tables, files or bundled ones: which classes of which sources are one class (docs/vocabularies.md)."""
    by_name: bool = False
    """Classes of equal names are one too, where no table and no map speaks of them."""
    bands: bool = False
    """Make frequency bands from the sources' counts of the classes (LVIS's: rare up to 10 images, common up to 100)."""
    val: Any = None
    """Folder (or url prefix) of the validation source, or {index, vocabulary, map}; none: no validation loss, nothing
    to evaluate by default."""
    task: str = choice("panoptic", "semantic", "instance")
    """What a segment is: panoptic as packed; semantic joins the segments of a class; instance drops stuff."""
    crop: list[int] = field(default_factory=lambda: [512, 512])
    """Height and width of a training sample in pixels (paper: 512 on ADE20K, 640 on COCO-Stuff-10k)."""
    resize: str = choice("scale", "detr")
    """scale: shorter side drawn from `scale`, then a random crop; detr: shorter side 480 to 800, half of the time after
    a crop of 384 to 600 of a resized image (paper: scale, on COCO panoptic detr). With detr `crop` is a canvas: what
    is larger is scaled down to fit, what is smaller padded; `scale` is not used."""
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Range of the shorter side before cropping, as a multiple of the crop's shorter side (paper: 0.5 to 2.0)."""
    flip: float = 0.5
    """Probability of a horizontal flip (paper: 0.5)."""
    color: bool = True
    """Colour jitter of SSD: brightness 32, contrast and saturation 0.5-1.5, hue 18 of 180, each with p 0.5 (paper)."""
    shuffle: str = choice("blocks", "full")
    """blocks: permute blocks and the samples inside (sequential reads); full: single samples (small, local sources)."""
    block_samples: int = 128
    """Samples of a block, one ranged read (64 to 256 suit object stores and parallel file systems)."""
    repeat_threshold: float = 0.0
    """t of repeat-factor sampling: an image comes max(1, sqrt(t / share of images with its rarest class)) times an
    epoch (Gupta et al. 2019, LVIS: 0.001); 0: every image once."""
    cache_dir: Optional[str] = None
    """Folder on a local disk (NVMe) that keeps what was read of sources elsewhere, remote or on another file system;
    the ranks of a node share it. None: no cache."""
    cache_gib: float = 64.0
    """GiB that cache_dir may hold; what was used longest ago goes first."""
    workers: int = 2
    """Loader processes a rank; 0 loads in the training process. Changes nothing about the order."""
    prefetch_steps: int = 2
    """Steps a worker prepares ahead."""
    buffer_mib: int = 256
    """MiB of block buffers a process; beyond it samples are read singly."""
    max_pixels: int = 89_478_485
    """An image above this many pixels is quarantined from its header, before decoding (Pillow's own limit)."""
    max_bad_fraction: float = 0.001
    """Share of quarantined samples at which the run stops (after at least one block was read)."""
    log_keys: bool = False
    """Write the sample keys of every step into metrics.jsonl."""


@dataclass
class LossConfig:
    """Class cross-entropy, sigmoid focal and dice; weights of the paper."""

    class_weight: float = 1.0
    """Weight of the class cross-entropy (paper: 1)."""
    focal_weight: float = 20.0
    """Weight of the sigmoid focal mask loss (paper: 20)."""
    dice_weight: float = 1.0
    """Weight of the dice mask loss (paper: 1)."""
    no_object_weight: float = 0.1
    """Class weight of no-object in the cross-entropy (paper: 0.1)."""
    class_balance: str = choice("none", "balanced", "seesaw", "equalisation")
    """Long tails in the class cross-entropy, by the images of each class in the sources' indexes: none (paper);
    balanced: softmax with the classes' shares (Ren et al. 2020); seesaw (Wang et al. 2021); equalisation (Tan et al.
    2020, softmax form). No-object is left alone in all of them."""
    seesaw_p: float = 0.8
    """Exponent of the mitigation factor, of the ratio of images (Wang et al.: 0.8); 0: none."""
    seesaw_q: float = 2.0
    """Exponent of the compensation factor, of the ratio of probabilities (Wang et al.: 2); 0: none."""
    equalisation_images: int = 100
    """Images up to which a class is rare for equalisation (100: LVIS's rare and common classes)."""
    equalisation_share: float = 0.9
    """Share of a rare class's part as a wrong answer that equalisation leaves out; 0: nothing, 1: all of it."""
    focal_alpha: float = 0.25
    """Focal loss alpha (paper: 0.25)."""
    focal_gamma: float = 2.0
    """Focal loss gamma (paper: 2)."""
    ignored_pixels: str = choice("negative", "exclude")
    """negative: ignored pixels are negatives of every mask (the paper's code); exclude: they leave loss and cost."""
    points: int = 0
    """Sampled points of each mask the mask losses are taken at; 0: all pixels (paper: all; Mask2Former: 12,544)."""
    kernels: str = choice("auto", "triton", "native", "eager")
    """Of mask loss and matching cost; auto: triton on CUDA, native (C++, built on first use) on a CPU, else eager."""


@dataclass
class MatchingConfig:
    """Weights of the matching cost (paper: as in the loss)."""

    class_weight: float = 1.0
    """Weight of the class cost, minus the class probability (paper: 1)."""
    focal_weight: float = 20.0
    """Weight of the focal cost (paper: 20)."""
    dice_weight: float = 1.0
    """Weight of the dice cost (paper: 1)."""
    nonfinite: str = choice("warn", "strict")
    """A non-finite cost: warn and replace by a large one, or stop naming layer, image key, query and term."""


@dataclass
class EvalConfig:
    """Validation loss in training, and inference."""

    every_steps: int = 5000
    """Steps between validation losses in training; 0: none."""
    loss_samples: int = 512
    """Samples of the validation source the validation loss is taken over."""
    metrics_every_steps: int = 5000
    """Steps between evaluations (mIoU, PQ, AP as of `evaluate`) of the validation source in training; 0: none (5000:
    MaskFormer's in detectron2)."""
    metrics_samples: int = 0
    """Samples of the validation source, the first ones, that these evaluations take; 0: all."""
    weights: str = choice("auto", "ema", "raw")
    """Weights that are validated, evaluated and exported; auto: the moving average where the run keeps one."""
    short_side: int = 512
    """Shorter side in pixels an image is resized to for inference (paper: the crop size)."""
    max_side: int = 2048
    """Longer side after resizing at most (paper: 2048 on ADE20K, 1333 on COCO)."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """Multiples of short_side and max_side an image is predicted at; the class scores of several are averaged, which
    needs data.task=semantic (paper: 0.5, 0.75, 1, 1.25, 1.5, 1.75 on ADE20K)."""
    flip: bool = False
    """Predict the mirrored image too and average the class scores; needs data.task=semantic (paper: with scales)."""
    window: list[int] = field(default_factory=list)
    """Height and width in pixels of a window that is slid over the resized image; class scores are averaged where
    windows overlap, which needs data.task=semantic; empty: the whole image at once (paper)."""
    window_overlap: float = 0.33
    """Share of a window that the next one covers again, at least (mmsegmentation's recipes: 1/3)."""
    object_threshold: float = 0.8
    """Panoptic: class probability below which a query is dropped (paper: 0.8)."""
    overlap_threshold: float = 0.8
    """Panoptic: share of its mask a segment must keep (paper: 0.8)."""
    mask_threshold: float = 0.5
    """Probability from which a pixel belongs to a mask (paper: 0.5)."""
    instance_top_k: int = 100
    """Instance: (query, class) pairs kept of an image, best first (100: detectron2's and COCO's)."""
    logit_adjustment: float = 0.0
    """tau of logit adjustment (Menon et al. 2021): tau x the log of a class's share of the training images, which
    the checkpoint carries, is taken off its logit; no-object keeps its probability. 0: off, 1: as if all classes were
    equally frequent."""
    instance_threshold: float = 0.0
    """Instance: class probability x mask quality below which an instance is dropped (0: none is, for AP)."""
    memory_budget: int = 64
    """MiB that masks and class scores at an image's full size may take at once, beside the prediction and the result;
    no result depends on it."""
    boundary: bool = False
    """Evaluate on boundary IoU as well, of the pixels within 2% of the image's diagonal of an outline (Cheng et al.
    2021)."""


@dataclass
class TrackingConfig:
    """Weights & Biases; metrics.jsonl is always written."""

    wandb: str = choice("auto", "offline", "online", "disabled")
    """auto: online with WANDB_API_KEY in the environment, else offline."""
    project: str = "mf_scale"
    """W&B project."""
    name: Optional[str] = None
    """W&B run name; none takes the run directory's name."""


@dataclass
class Config:
    """A run."""

    run_dir: str = "runs/default"
    """Everything the run writes. The same directory again resumes the run."""
    seed: int = 0
    """Seed of order, augmentation, initialisation and dropout."""
    data: DataConfig = field(default_factory=DataConfig)
    """Samples."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss terms."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """Hungarian matching."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps and batch."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """DeepSpeed ZeRO."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Keys added to DeepSpeed's own configuration; those that other sections set, and unknown ones, are refused."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Moving average of the weights."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Dead steps and loss spikes."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Commits."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Validation and inference."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """W&B."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Requeueing."""
