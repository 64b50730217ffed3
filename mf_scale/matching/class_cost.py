"""The class term of the matching cost, from factored logits a part at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from mf_scale.kernels.class_rows import Logits, hidden, hide, parts
from mf_scale.models.outputs import Classifier


@torch.no_grad()
def class_probabilities(
    embeddings: Tensor,
    classifier: Classifier,
    labels: Tensor,
    asked: Tensor | None = None,
    logits: Logits | None = None,
) -> Tensor:
    """Probability of each segment's class, [B,R,T], for rows [B,R,W]; in fp32 (fp64 for fp64), without gradient.

    `labels` int64 [B,T], padding below 0 (its columns mean nothing). `asked` [B,K+1], of `asked_classes`: UNKNOWN
    classes leave the softmax. Memory: that of the result and of a part. `logits`, of the same embeddings and
    classifier, keep theirs where they are one part.
    """
    logits, labels = logits or Logits(embeddings, classifier), labels.clamp(min=0)[:, None]
    found = []
    for images, rows in parts(embeddings, len(classifier.weight)):
        own = logits.of(logits.rows(images, rows))
        if asked is not None:
            hide(own, hidden(asked[images], None))
        count = images.stop - images.start
        index = labels[images].expand(-1, rows.stop - rows.start, -1)
        found.append(own.softmax(dim=1).view(count, -1, own.shape[1]).gather(2, index).flatten(0, 1))
        logits.kept = own if own.shape[0] == embeddings.shape[:2].numel() else None
    together = found[0] if len(found) == 1 else torch.cat(found)
    return together.view(*embeddings.shape[:2], labels.shape[2])
