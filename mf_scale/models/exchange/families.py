"""The backbones whose names other programs know too: ResNets and Swin Transformers, by what they are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ResNet:
    """A ResNet as timm, transformers and detectron2 (with torchvision's strides) build it alike."""

    depths: tuple[int, ...]
    """Blocks of the four stages."""
    bottleneck: bool = True
    """Three convolutions a block, the output four times as wide; else two (ResNet-18 and 34)."""
    deep_stem: bool = False
    """Three 3x3 convolutions instead of one 7x7: DeepLab's stem, the "c" of R101c."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the four stages."""
        return tuple((256 if self.bottleneck else 64) * 2**i for i in range(4))

    @property
    def channels(self) -> int:
        """Channels of the stride-32 map."""
        return self.widths[-1]

    def has_shortcut(self, stage: int) -> bool:
        """Whether the first block of a stage (0 to 3) projects its input: where stride or width changes."""
        return self.bottleneck or stage > 0


@dataclass(frozen=True)
class Swin:
    """A Swin Transformer with windows of `window` x `window` tokens."""

    width: int
    """Channels of the first stage."""
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int

    @property
    def channels(self) -> int:
        """Channels of the stride-32 map."""
        return self.width * 2 ** (len(self.depths) - 1)


_R50, _R101, _R152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
FAMILIES: dict[str, ResNet | Swin] = {
    "resnet18": ResNet((2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNet((3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNet(_R50),
    "resnet101": ResNet(_R101),
    "resnet152": ResNet(_R152),
    "resnet50s": ResNet(_R50, deep_stem=True),
    "resnet101s": ResNet(_R101, deep_stem=True),
    "resnet152s": ResNet(_R152, deep_stem=True),
    "swin_tiny_patch4_window7_224": Swin(96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_small_patch4_window7_224": Swin(96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_base_patch4_window7_224": Swin(128, (2, 2, 18, 2), (4, 8, 16, 32), 7),
    "swin_base_patch4_window12_384": Swin(128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
    "swin_large_patch4_window7_224": Swin(192, (2, 2, 18, 2), (6, 12, 24, 48), 7),
    "swin_large_patch4_window12_384": Swin(192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
}
"""timm's names."""


def family(name: str) -> ResNet | Swin | None:
    """What timm's model `name` is made of, whatever its pretraining tag behind a dot; None for other backbones."""
    return FAMILIES.get(name.split(".", maxsplit=1)[0])


def name_of(wanted: ResNet | Swin) -> str | None:
    """timm's name of a backbone made like `wanted`, or None."""
    return next((name for name, made in FAMILIES.items() if made == wanted), None)
