"""A source to be placed whose vocabulary has a name that the run knows, and is another one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mf_scale.errors import UserError
from mf_scale.unify import LEFT_OUT, Source, place, unify
from mf_scale.vocabulary import Vocabulary
from tests.unit.test_unify import AB, A, B, vocabulary

ORDER = "named 'a': order or kinds of their classes differ"
CASES = {
    "a class more": (
        "cat* dog* sky cow*",
        r"named 'a': no class of the run was made of 'cow' \(data.val\)\. Pack it again with",
    ),
    "a class less": ("cat* sky", r"named 'a': the source has no 'dog' \(data.val\)\. Pack it"),
    "another order": ("dog* cat* sky", ORDER),
    "another kind": ("cat dog* sky", ORDER),
    "other classes": (
        "cat* cow* sky",
        r"no 'dog'; no class of the run was made of 'cow' \(data.val\)\. Pack",
    ),
}


def run(*, kept: bool = True) -> Vocabulary:
    """Of A without its sky, and B; `kept`: with the digests of the two."""
    made = unify([Source(A, map={"sky": None}), Source(B)], [AB]).vocabulary
    made = Vocabulary.from_dict(json.loads(json.dumps(made.to_dict())))
    return made if kept else replace(made, made_of=())


def refused(made: Vocabulary, source: Source, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        place(made, source, [AB], by_name=True)
    assert "\n" not in str(caught.value)


def test_the_digests_are_kept_with_the_members() -> None:
    made = unify([Source(A), Source(B), Source(A)], [AB]).vocabulary
    assert made.made_of == (("a", A.digest), ("b", B.digest))
    assert json.loads(json.dumps(made.to_dict()))["made_of"] == {"a": A.digest, "b": B.digest}
    assert Vocabulary.from_dict(made.to_dict()).made_of == made.made_of
    assert "made_of" not in A.to_dict() and Vocabulary.from_dict(A.to_dict()).made_of == ()
    for said in ([["a", "b"]], "a", 3):
        with pytest.raises(UserError, match="the vocabulary cannot be read"):
            Vocabulary.from_dict({**made.to_dict(), "made_of": said})


def test_the_vocabulary_that_was_trained_on_is_placed_as_it_was() -> None:
    assert place(run(), Source(A), [AB]).labels.tolist() == [0, 1, LEFT_OUT]
    assert place(run(), Source(A, map={"sky": "sky", "dog": None}), [AB]).labels.tolist() == [0, LEFT_OUT, 2]


@pytest.mark.parametrize("case", CASES)
def test_another_one_of_its_name_is_refused(case: str) -> None:
    text, match = CASES[case]
    source = Source(vocabulary("a", text), "data.val")
    refused(run(), source, "have two different vocabularies named 'a'")
    refused(A, source, match)
    mapped = replace(source, map=dict.fromkeys(source.vocabulary.names))
    refused(run(), mapped, "have two different vocabularies named 'a'")
    if case != "another kind":
        assert place(run(), Source(vocabulary("new", text)), by_name=True).vocabulary == "new"


def test_a_run_of_the_time_before_tells_by_its_members() -> None:
    old = run(kept=False)
    refused(old, Source(A), r"no class of the run was made of 'sky'\..* or map to null what training left out \(docs")
    assert place(old, Source(A, map={"sky": None}), [AB]).labels.tolist() == [0, 1, LEFT_OUT]
    refused(old, Source(vocabulary("a", "cat* cow*"), map={"cow": None}), r"the source has no 'dog'\. Pack it")
    assert place(old, Source(vocabulary("a", "dog* cat*")), [AB]).labels.tolist() == [1, 0]
