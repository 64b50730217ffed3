"""The laws of unification: order decides nothing but labels, maps are whole, declarations are transitive."""

from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mf_scale.errors import UserError
from mf_scale.unify import LEFT_OUT, MergeTable, Source, Unified, unify
from mf_scale.vocabulary import ClassInfo, Vocabulary

FAST = settings(max_examples=80, deadline=None)
NAMES = list("pqrst")


@st.composite
def vocabularies(draw) -> list[Vocabulary]:
    names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True)
    return [
        Vocabulary(f"v{i}", tuple(ClassInfo(n, True, k) for k, n in enumerate(draw(names))))
        for i in range(draw(st.integers(1, 4)))
    ]


@st.composite
def tables_over(draw, known: list[Vocabulary]) -> list[MergeTable]:
    members = [(v.name, c.name) for v in known for c in v.classes]
    tables = []
    for t in range(draw(st.integers(0, 3))):
        row_of = draw(st.lists(st.sampled_from([None, "x", "y", "z"]), min_size=len(members), max_size=len(members)))
        rows: dict[str, dict[str, list[str]]] = {}
        for row, (vocabulary, name) in zip(row_of, members, strict=True):
            if row:
                rows.setdefault(row if draw(st.booleans()) else f"{row}{t}", {}).setdefault(vocabulary, []).append(name)
        tables.append(
            MergeTable.from_dict({"name": f"t{t}", "classes": [{"name": n, "members": m} for n, m in rows.items()]})
        )
    return tables


@st.composite
def cases(draw) -> tuple[list[Source], list[MergeTable], bool]:
    known = draw(vocabularies())
    left_out = st.sampled_from([None, None, *NAMES])
    sources = [
        Source(v, f"s{i}", {out: None} if (out := draw(left_out)) in v.names else {})
        for i, v in enumerate(draw(st.permutations([*known, *known[:1]])))
    ]
    return sources, draw(tables_over(known)), draw(st.booleans())


def unified_or_none(sources, tables, by_name) -> Unified | None:
    try:
        return unify(sources, tables, by_name=by_name)
    except UserError:
        return None


def classes_of(unified: Unified) -> dict[str, set[tuple[str, str]]]:
    """The unified classes without their order."""
    return {name: set(own) for name, own in zip(unified.vocabulary.names, unified.members, strict=True)}


@FAST
@given(cases(), st.randoms(use_true_random=False))
def test_order_decides_nothing_but_labels(case, random):
    sources, tables, by_name = case
    turned = random.sample(sources, len(sources)), random.sample(tables, len(tables))
    one, other = unified_or_none(sources, tables, by_name), unified_or_none(*turned, by_name)
    assert (one is None) == (other is None)
    if one and other:
        assert classes_of(one) == classes_of(other)


@FAST
@given(cases())
def test_every_source_label_goes_to_one_unified_label_or_none(case):
    unified = unified_or_none(*case)
    assume(unified is not None)
    assert unified is not None
    assert len(set(unified.vocabulary.names)) == len(unified.vocabulary)
    home = {member: label for label, own in enumerate(unified.members) for member in own}
    assert len(home) == sum(map(len, unified.members))
    for source, way in zip(case[0], unified.sources, strict=True):
        for info, label in zip(source.vocabulary.classes, way.labels, strict=True):
            left_out = info.name in source.map and source.map[info.name] is None
            assert label == (LEFT_OUT if left_out else home[source.vocabulary.name, info.name])
        image = {label for label in way.labels.tolist() if label != LEFT_OUT}
        assert set(np.flatnonzero(way.known).tolist()) == image
    assert np.any([way.known for way in unified.sources], axis=0).all()


@FAST
@given(cases())
def test_declared_classes_are_one_and_nothing_else_is(case):
    _, tables, by_name = case
    unified = unified_or_none(*case)
    assume(unified is not None and not by_name)
    assert unified is not None
    rows = [
        (row.name, {(v, c) for v, own in row.members.items() for c in own} & set(chain(*unified.members)))
        for table in tables
        for row in table.rows
    ]
    linked = {member: {member} for member in chain(*unified.members)}
    changed = True
    while changed:  # the closure, by brute force: what shares a row, or rows that share a name
        changed = False
        for name, own in rows:
            joined = set(own).union(*(other for n, other in rows if n == name))
            joined = joined.union(*(linked[member] for member in joined))
            for member in joined:
                if linked[member] != joined:
                    linked[member], changed = linked[member] | joined, True
    assert {frozenset(own) for own in unified.members} == {frozenset(own) for own in linked.values()}


@FAST
@given(cases())
def test_merging_again_changes_nothing(case):
    sources, tables, by_name = case
    unified = unified_or_none(*case)
    assume(unified is not None)
    assert unified is not None
    twice = unify([*sources, *sources], [*tables, *tables], by_name=by_name)
    assert twice.vocabulary == unified.vocabulary
    again = unify([Source(unified.vocabulary)], by_name=by_name)
    assert again.vocabulary == unified.vocabulary
    assert again.sources[0].labels.tolist() == list(range(len(unified.vocabulary)))
