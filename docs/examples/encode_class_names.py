"""Class embeddings by an encoder of sentences in transformers' format (BERT and its like): see docs/classes.md.

python docs/examples/encode_class_names.py MODEL_FOLDER VOCABULARY.json OUT.safetensors
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from mf_scale.models.class_embeddings import write_class_embeddings
from mf_scale.vocabulary import Vocabulary

TEMPLATES = ("{}", "a photo of a {}.", "there is {} in the picture.")


def spoken(name: str) -> str:
    """What a class is called in a sentence: 'wall-other-merged' is a wall, 'door-stuff' a door."""
    words = re.sub(r"[-_,;/()]+", " ", name).split()
    return " ".join(word for word in words if word not in ("merged", "other", "stuff")) or name


@torch.no_grad()
def encode(folder: str | Path, names: list[str]) -> Tensor:
    """[K,D]: the mean over the templates of what the encoder says, each of length 1."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    rows = []
    for name in names:
        sentences = [template.format(spoken(name)) for template in TEMPLATES]
        tokens = tokenizer(sentences, padding=True, return_tensors="pt")
        states = model(**tokens).last_hidden_state
        said = tokens["attention_mask"][..., None]
        rows.append(F.normalize((states * said).sum(1) / said.sum(1), dim=1).mean(0))
    return torch.stack(rows)


if __name__ == "__main__":
    folder, given, out = sys.argv[1:]
    vocabulary = Vocabulary.load(given)
    write_class_embeddings(out, encode(folder, vocabulary.names).half(), vocabulary)
    print(f"{out}: {len(vocabulary):,} classes of {vocabulary.name}")
