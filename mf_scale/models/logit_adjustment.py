"""Logit adjustment at inference: classes judged as if all were equally frequent. Source: Menon et al. 2021.

tau x log prior is taken off each class's logit. no-object has no share among the images: of each query it keeps its
probability to the bit of rounding, and the classes share the rest anew. Taken off plainly, a query without an object
would be called rare: a class that is seen a thousand times less than the mean gains 6.9 on no-object as well.

Classes that are hidden (a logit of -inf) take no part: who hides some does so before, as `evaluation.asked` does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mf_scale.errors import UserError
from mf_scale.kernels.class_rows import shift_among_classes
from mf_scale.models.outputs import Classifier, MaskPrediction, PixelPrediction
from mf_scale.vocabulary import Vocabulary, log_prior


def adjust_logits(model: nn.Module, vocabulary: Vocabulary, tau: float, *, where: str) -> nn.Module:
    """Let `model` answer with adjusted logits from now on (tau 0: as it is); returns it.

    UserError where the vocabulary does not know how many training images its classes have; `where` it was read.
    """
    if tau == 0:
        return model
    images = vocabulary.images
    if images is None:
        raise UserError(
            f"eval.logit_adjustment = {tau:g} needs the number of training images of every class, and the vocabulary "
            f"{vocabulary.name!r} does not have them",
            where=where,
            remedy='Checkpoints of this version carry them ("images" in vocabulary.json); else take 0.',
        )
    added = torch.tensor([-tau * share for share in log_prior(images)], dtype=torch.float32)

    def after(module: nn.Module, inputs: Any, prediction: MaskPrediction | PixelPrediction) -> Any:
        return adjusted(prediction, added.to(prediction.pixel_embeddings.device))

    model.register_forward_hook(after)
    return model


def adjusted(prediction: MaskPrediction | PixelPrediction, added: Tensor) -> MaskPrediction | PixelPrediction:
    """The same prediction with `added` [K] on its class logits, still factored; the earlier layers are left out."""
    if isinstance(prediction, PixelPrediction):
        return replace(prediction, bias=added if prediction.bias is None else prediction.bias + added, aux=())
    return _adjusted_masks(prediction, added)


def _adjusted_masks(prediction: MaskPrediction, added: Tensor) -> MaskPrediction:
    """The number that each query's classes gain together is one more channel: its weight is 1, of no-object 0."""
    with torch.autocast(added.device.type, enabled=False):
        embeddings, given = prediction.class_embeddings.float(), prediction.classifier
        weight = given.weight.float()
        logits = given.logits(prediction.class_embeddings).float()[..., :-1]
        shift = shift_among_classes(logits, added)
        of_classes = torch.ones_like(weight[:, :1])
        of_classes[-1].zero_()
        bias = F.pad(added, (0, 1))
        return MaskPrediction(
            torch.cat((embeddings, shift[..., None]), dim=-1),
            prediction.mask_embeddings,
            prediction.pixel_embeddings,
            Classifier(
                torch.cat((weight, of_classes), dim=1), bias if given.bias is None else given.bias.float() + bias
            ),
        )
