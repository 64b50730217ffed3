"""Asked: a model that answers with the classes a source annotates, as it was trained on such images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mf_scale.data.index import Index
from mf_scale.models.outputs import Classifier, MaskPrediction, PixelPrediction


class Asked(nn.Module):
    """A model whose other classes have no probability at all: what a source does not annotate cannot be right in it.

    Their logits are -inf, as the class loss has it in training, so the classes that are asked for share all of it.
    """

    def __init__(self, model: nn.Module, known: Tensor) -> None:
        """`known` bool [K]."""
        super().__init__()
        self.model = model
        self.register_buffer("hidden", torch.zeros(len(known)).masked_fill(~known, -torch.inf), persistent=False)

    @property
    def stride(self) -> float:
        """Pixels of the image a cell of the prediction grid."""
        return float(self.model.stride)  # type: ignore[arg-type]  # every kind of model has it

    def forward(self, images: Tensor) -> MaskPrediction | PixelPrediction:
        """The model's prediction for uint8 images [B,3,H,W] without the hidden classes.

        They are hidden before the model's own hooks: logit adjustment, which is one, divides among the classes that
        are left. Over all classes it would give the asked ones' share to a hidden one, and that then to no-object.
        """
        with self.model.register_forward_hook(self._hide, prepend=True):
            prediction: MaskPrediction | PixelPrediction = self.model(images)
        return prediction

    def _hide(
        self, model: nn.Module, inputs: Any, prediction: MaskPrediction | PixelPrediction
    ) -> MaskPrediction | PixelPrediction:
        hidden = self.get_buffer("hidden")
        if isinstance(prediction, PixelPrediction):
            bias = hidden if prediction.bias is None else prediction.bias + hidden
            return replace(prediction, bias=bias)
        own: Classifier = prediction.classifier
        hidden = nn.functional.pad(hidden, (0, 1))  # no-object is always asked for
        bias = hidden if own.bias is None else own.bias + hidden
        return replace(prediction, classifier=Classifier(own.weight, bias))


def hidden_classes(prediction: MaskPrediction | PixelPrediction) -> Tensor | None:
    """The classes that the model was not asked for, bool [K]; None: there is none."""
    if isinstance(prediction, PixelPrediction):
        bias = prediction.bias
    else:
        bias = None if prediction.classifier.bias is None else prediction.classifier.bias[:-1]
    if bias is None:
        return None
    hidden = bias == -torch.inf
    return hidden if bool(hidden.any()) else None


def asked(model: nn.Module, index: Index) -> nn.Module:
    """The model as it is to be asked about the images of a source: itself where the source annotates every class."""
    if index.way is None or index.way.known.all():
        return model
    device = next(model.parameters()).device
    return Asked(model, torch.from_numpy(index.way.known)).to(device).train(model.training)
