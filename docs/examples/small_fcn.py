"""A per-pixel model as one has it: FCN on a ResNet-18, of torchvision's parts. For docs/per-pixel-to-masks.md."""

from safetensors.torch import load_file
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.segmentation.fcn import FCN, FCNHead

_WITHIN = "backbone.net."
"""How the names of its tensors begin in a checkpoint of mf_scale."""


def build(num_classes: int = 21, weights: str | None = None) -> nn.Module:
    """Images [B,3,H,W] -> {"out": logits [B,num_classes,H,W]}; features at stride 16.

    `weights`: a weights.safetensors of mf_scale that holds this model without its classifier; None: random weights.
    """
    body = create_feature_extractor(resnet18(weights=None), {"layer3": "out"})
    model = FCN(body, FCNHead(256, num_classes))
    if weights is not None:
        given = {name.removeprefix(_WITHIN): t for name, t in load_file(weights).items() if name.startswith(_WITHIN)}
        left = model.load_state_dict(given, strict=False)
        assert set(left.missing_keys) == {"classifier.4.weight", "classifier.4.bias"}, left
    return model
