"""Long tails in the class loss: what is added to a query's class logits before the softmax. Pure functions.

Every option is one `Adjustment`, and None is the paper's plain cross-entropy. What is added counts as a constant: the
gradient is softmax(logits + added) - one-hot, as the seesaw loss states it for its factors. Source: below, each.

No-object is no class of the vocabulary: how often it is the target follows from the number of queries, and the paper
weighs that with loss.no_object_weight. So nothing is ever added to its logit, and whether a query is an object at all
is learnt as without the option:
- balanced changes how the classes share what is not no-object, and keeps that share itself, for every query; so the
  fixed point of training is the plain probability of no-object and Ren's posterior among the classes.
- seesaw and equalisation say how much a class suffers as a wrong answer for another class. A query that has no
  segment is no evidence for another class, so its loss is plain, and all classes learn from it where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mf_scale.config.schema import LossConfig
from mf_scale.kernels.class_rows import shift_among_classes
from mf_scale.vocabulary import log_prior

_SMALLEST_OWN = 0.01
"""Probability of the right class below which seesaw's compensation grows no further (1e4 at q = 2)."""


class Adjustment(Protocol):
    """What is added to class logits before the softmax of the class loss."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits [n,K+1] in fp32 or fp64, -inf for an unknown class; targets int64 [n], K: no-object -> [n,K+1],
        exactly 0 for no-object and, but for balanced, for the target. Without gradient, and without a wait for the GPU.
        """


def make_adjustment(loss: LossConfig, images: Sequence[int]) -> Adjustment | None:
    """The adjustment that loss.class_balance names; `images` [K] that hold each class, summed over the sources."""
    if loss.class_balance == "balanced":
        return BalancedSoftmax(images)
    if loss.class_balance == "seesaw":
        return Seesaw(images, loss.seesaw_p, loss.seesaw_q)
    if loss.class_balance == "equalisation":
        return Equalisation(images, loss.equalisation_images, loss.equalisation_share)
    return None


class _ByClass:
    """A number a class, kept where it is used."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = torch.tensor(list(values), dtype=torch.float64)
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, logits: Tensor) -> Tensor:
        """The numbers [K] in dtype and on the device of `logits`."""
        place = logits.device, logits.dtype
        if place not in self._copies:
            self._copies[place] = self._values.to(*place)
        return self._copies[place]


class BalancedSoftmax:
    """log of a class's share of the images. Source: Ren et al. 2020, Balanced Meta-Softmax, equation 4."""

    def __init__(self, images: Sequence[int]) -> None:
        self._prior = _ByClass(log_prior(images))

    @torch.no_grad()
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Adjustment`; the same for every target."""
        prior = self._prior.like(logits)
        return F.pad(prior + shift_among_classes(logits[:, :-1], prior)[:, None], (0, 1))


class Seesaw:
    """Negatives of a rare class push a frequent one less. Source: Wang et al. 2021, Seesaw Loss, equations 3 to 6.

    The number of images stands for the instances that the paper counts as it goes. The compensation's probabilities
    are those among the classes, without no-object, as in the paper, which tells objects apart beside the classes.
    """

    def __init__(self, images: Sequence[int], p: float, q: float) -> None:
        self._log_images = _ByClass([math.log(max(1, count)) for count in images])
        self._p, self._q = p, q

    @torch.no_grad()
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Adjustment`."""
        count = self._log_images.like(logits)
        last = len(count) - 1
        own = targets.clamp(max=last)
        mitigation = (count - count[own][:, None]).clamp_(max=0).mul_(self._p)
        log_probability = logits[:, :-1].log_softmax(dim=1)
        right = log_probability.gather(1, own[:, None]).clamp_(min=math.log(_SMALLEST_OWN))
        compensation = (log_probability - right).clamp_(min=0).mul_(self._q)
        return _for_objects(mitigation.add_(compensation), targets)


class Equalisation:
    """Rare classes suffer less as wrong answers. Source: Tan et al. 2020, Equalization Loss, its softmax form.

    The paper leaves a rare negative out with a probability; the weight here is that draw's mean, 1 - share, so that
    nothing is random. Rare is a class in at most `most` images.
    """

    def __init__(self, images: Sequence[int], most: int, share: float) -> None:
        kept = math.log(1 - share) if share < 1 else -math.inf
        self._log_weight = _ByClass([kept if count <= most else 0.0 for count in images])

    @torch.no_grad()
    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Adjustment`."""
        weight = self._log_weight.like(logits)
        added = weight.expand(len(targets), -1).clone()
        own = targets.clamp(max=len(weight) - 1)[:, None]
        return _for_objects(added.scatter_(1, own, 0.0), targets)


def _for_objects(added: Tensor, targets: Tensor) -> Tensor:
    """[n,K] -> [n,K+1]: nothing for no-object, and for rows whose target it is."""
    rows = (targets < added.shape[1])[:, None]
    return F.pad(torch.where(rows, added, torch.zeros_like(added)), (0, 1))
