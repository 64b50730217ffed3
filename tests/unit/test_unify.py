"""Unified vocabularies: what tables and maps make one class, what is refused, what is printed, the bundled tables."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mf_scale.errors import UserError
from mf_scale.unify import (
    LEFT_OUT,
    MergeTable,
    Source,
    check_source,
    describe,
    read_map,
    unified_counts,
    unified_federation,
    unify,
    whole_text,
    with_bands,
)
from mf_scale.unify.tables import bundled_tables
from mf_scale.unify.words import merge_lines
from mf_scale.vocabulary import ClassInfo, Vocabulary

FOLDER = Path(__file__).parents[2] / "data_tools" / "vocabularies"


def vocabulary(name: str, text: str) -> Vocabulary:
    """`cat* sky tree`: a star marks a thing."""
    names = text.split()
    return Vocabulary(name, tuple(ClassInfo(n.rstrip("*"), n.endswith("*"), i + 1) for i, n in enumerate(names)))


def table(rows: dict, name: str = "t", **more) -> MergeTable:
    classes = [{"name": unified, **(row if "members" in row else {"members": row})} for unified, row in rows.items()]
    return MergeTable.from_dict({"name": name, "classes": classes, **more}, where=f"{name}.json")


A = vocabulary("a", "cat* dog* sky")
B = vocabulary("b", "sky kitty* puppy* hound*")
AB = table({"cat": {"a": "cat", "b": "kitty"}, "dog": {"a": "dog", "b": ["puppy", "hound"]}})


def refused(*args, match: str, **kwargs) -> None:
    with pytest.raises(UserError, match=match) as caught:
        unify(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_a_table_makes_one_vocabulary_and_a_map_for_each_source():
    unified = unify([Source(A), Source(B)], [AB], name="pets")
    assert unified.vocabulary.name == "pets"
    assert unified.vocabulary.names == ["cat", "dog", "sky (a)", "sky (b)"]
    assert unified.vocabulary.things == [True, True, False, False]
    first, second = unified.sources
    assert first.labels.tolist() == [0, 1, 2]
    assert second.labels.tolist() == [3, 0, 1, 1]
    assert first.labels.dtype == np.int64
    assert first.known.tolist() == [True, True, True, False]
    assert second.known.tolist() == [True, True, False, True]
    assert not first.joined.any()
    assert not second.joined.any()
    assert unified.members[1] == (("a", "dog"), ("b", "puppy"), ("b", "hound"))


def test_equal_names_merge_nothing_unless_they_are_trusted():
    assert len(unify([Source(A), Source(B)]).vocabulary) == 7
    unified = unify([Source(A), Source(B)], [AB], by_name=True)
    assert unified.vocabulary.names == ["cat", "dog", "sky"]
    assert unified.sources[1].labels.tolist() == [2, 0, 1, 1]


def test_what_a_row_names_alone_is_not_merged_by_name():
    unified = unify([Source(A), Source(B)], [table({"heaven": {"b": "sky"}})], by_name=True)
    assert {"sky", "heaven"} < set(unified.vocabulary.names)


def test_trusted_names_join_the_row_of_that_name():
    sources = [Source(A), Source(vocabulary("c", "puss*")), Source(vocabulary("d", "cat*"))]
    unified = unify(sources, [table({"cat": {"a": "cat", "c": "puss"}})], by_name=True)
    assert unified.members[0] == (("a", "cat"), ("c", "puss"), ("d", "cat"))
    assert unify(sources, [table({"cat": {"a": "cat", "c": "puss"}})]).vocabulary.names[-1] == "cat (d)"


def test_declarations_add_up_over_tables():
    c = vocabulary("c", "feline*")
    unified = unify(
        [Source(A), Source(B), Source(c)], [table({"cat": {"a": "cat", "b": "kitty"}}, "one"),
                                            table({"feline": {"b": "kitty", "c": "feline"}}, "two")]
    )  # fmt: skip
    assert unified.members[0] == (("a", "cat"), ("b", "kitty"), ("c", "feline"))
    assert unified.vocabulary.names[0] == "cat"
    by_name_of_row = [table({"cat": {"a": "cat"}}, "one"), table({"cat": {"c": "feline"}}, "two")]
    assert unify([Source(A), Source(c)], by_name_of_row).members[0] == (("a", "cat"), ("c", "feline"))


def test_a_map_speaks_before_the_tables_and_leaves_classes_out():
    unified = unify([Source(A, map={"cat": "tiger", "sky": None}), Source(B)], [AB])
    assert unified.vocabulary.names == ["tiger", "dog", "sky", "cat"]
    assert unified.sources[0].labels.tolist() == [0, 1, LEFT_OUT]
    assert unified.sources[0].left_out == ("sky",)
    assert unified.sources[0].known.tolist() == [True, True, False, False]
    joined = unify([Source(A, map={"sky": "air"}), Source(B, map={"sky": "air"})])
    assert joined.members[joined.vocabulary.names.index("air")] == (("a", "sky"), ("b", "sky"))


def test_two_sources_of_one_vocabulary_share_their_classes():
    unified = unify([Source(A, map={"cat": None}), Source(A)])
    assert unified.vocabulary.names == ["dog", "sky", "cat"]
    assert unified.sources[0].labels.tolist() == [LEFT_OUT, 0, 1]
    assert unified.sources[1].labels.tolist() == [2, 0, 1]
    assert unified.members[0] == (("a", "dog"),)


def test_rename_follows_chains():
    tables = [AB, table({}, "r1", rename={"cat": "pet", "sky (a)": "sky"}), table({}, "r2", rename={"pet": "Katze"})]
    assert unify([Source(A), Source(B)], tables).vocabulary.names == ["Katze", "dog", "sky", "sky (b)"]
    both = [table({"cat": {"a": "cat"}}, "x"), table({"puss": {"a": "cat"}}, "y", rename={"cat": "puss"})]
    assert unify([Source(A)], both).vocabulary.names[0] == "puss"


def test_a_class_of_things_and_stuff_is_stuff_where_its_row_says_so():
    stuff = vocabulary("s", "cat sky")
    row = {"thing": "if all", "members": {"a": "cat", "s": "cat"}}
    unified = unify([Source(A), Source(stuff)], [table({"cat": row})])
    assert not unified.vocabulary.things[0]
    assert unified.sources[0].joined.tolist() == [True, False, False, False]
    assert not unified.sources[1].joined.any()
    assert unify([Source(A)], [table({"cat": row}, vocabularies=["s"])]).vocabulary.things[0]
    folded = unify([Source(vocabulary("f", "tree bush"))], [table({"tree": {"f": ["tree", "bush"]}})])
    assert folded.sources[0].joined.tolist() == [True]


def test_conflicts_are_refused():
    two = [Source(A), Source(B)]
    refused([Source(A), Source(vocabulary("a", "cat*"))], match="two different vocabularies are both named 'a'")
    refused([Source(A, map=dict.fromkeys(A.names))], match="no class is left")
    refused([Source(B), Source(A, map=dict.fromkeys(A.names))], match="leaves out every class")
    refused([], match="no class is left")
    link = [table({"x": {"a": "cat", "b": "kitty"}}, "one"), table({"y": {"b": "kitty", "a": "dog"}}, "two")]
    refused(two, link, match="two classes of one vocabulary would become one")
    refused([Source(A, map={"cat": "sky"}), Source(B)], match="map different classes to 'sky'")
    refused([Source(A, map={"cat": "kitty"}), Source(B)], match=r'b "kitty" has that name of itself')
    refused([Source(A, map={"cat": "dog"}), Source(B)], [AB], match="two classes of one vocabulary")
    refused([Source(A, "s0", {"cat": "x"}), Source(A, "s1")], match="differently: s0 to 'x' and s1 not at all")
    refused(two, [table({"cat": {"a": "cat", "b": "sky"}})], match="would be a thing and stuff: thing in a")
    refused(
        two, [table({"cat": {"thing": False, "members": {"a": "cat"}}})], match="calls 'cat' stuff, and its classes"
    )
    refused(
        two, [table({"x": {"a": "cat"}}, "p", rename={"x": "y"}), table({}, "q", rename={"x": "z"})], match="and to 'z'"
    )
    refused(two, [table({}, rename={"cat": "dog"})], match="two unified classes would be named 'dog'")
    refused([Source(A), Source(vocabulary("c", "sky*"))], by_name=True, match="a thing and stuff")


def test_a_map_across_a_table_or_equal_names_is_refused():
    both = vocabulary("a", "car* person* sky"), vocabulary("b", "car* person* sky")
    swapped = [Source(both[0], map={"car": "person", "person": "car"}), Source(both[1])]
    rows = table({name: {"a": name, "b": name} for name in ("car", "person")})
    for declared in ({"tables": [rows]}, {"by_name": True}):
        refused(swapped, match=r"different classes to one: a \"car\" is 'person' by the map of a", **declared)
        right = unify([Source(both[0], map={"car": "car"}), Source(both[1])], **declared).vocabulary
        assert len(right) == (3 if "by_name" in declared else 4)


def test_maps_that_call_different_classes_by_one_name_are_refused():
    cars, people = vocabulary("a", "car* person* sky"), vocabulary("b", "car* person* auto*")
    crossed = Source(cars, map={"car": "x"}), Source(people, map={"person": "x"})
    told = (
        "a \"car\" is 'x' by the map of a and b \"person\" is 'x' by the map of b, but a has 'person' as another class"
    )
    refused(crossed, match=f"sources map different classes to one: {told}")
    refused(crossed[::-1], match="b has 'car' as another class")
    assert (
        len(
            unify(
                [Source(cars, map={"car": "x", "person": None}), Source(people, map={"person": "x", "car": None})]
            ).vocabulary
        )
        == 3
    )
    for own in ("car", "auto"):
        other = {name: None for name in ("car", "auto") if name != own}
        assert "x" in unify([crossed[0], Source(people, map={own: "x", **other})]).vocabulary.names
    meant = table({"x": {"a": "car", "b": "person"}})
    assert "x" in unify([Source(cars), Source(people)], [meant]).vocabulary.names, "a row says it on purpose"


def test_cycles_and_unknown_names_are_refused():
    two = [Source(A), Source(B)]
    circle = [table({}, "p", rename={"cat": "pet"}), table({}, "q", rename={"pet": "cat"})]
    refused(two, circle, match="in a circle: 'cat' -> 'pet' -> 'cat'")
    refused(two, [table({}, rename={"cat": "cat"})], match="in a circle")
    refused(two, [table({"x": {"a": "cta"}})], match="names classes that are not there: a \"cta\".*Did you mean 'cat'")
    refused(two, [table({"x": {"aa": "cat"}})], match="vocabularies that no source has: 'aa'.*Did you mean 'a'")
    refused(two, [table({"x": {"z": "cat"}}, vocabularies=["z"])], match="none of the sources' vocabularies")
    refused(two, [table({}, rename={"catt": "x"})], match="no unified class has that name.*Did you mean 'cat'")
    refused([Source(A, map={"dogg": "x"})], match="does not have: 'dogg'.*Did you mean 'dog'")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "is not an object"),
        ({"classes": []}, "has None for a name"),
        ({"name": "t", "clases": []}, "unknown key 'clases'.*Did you mean 'classes'"),
        ({"name": "t", "classes": {}}, "not a list"),
        ({"name": "t", "classes": [{"name": "x"}]}, "no members"),
        ({"name": "t", "classes": [{"name": "x", "members": {"a": []}}]}, "names no class of a"),
        ({"name": "t", "classes": [{"name": "x", "members": {"a": 3}}]}, "has 3 for a name"),
        ({"name": "t", "classes": [{"name": "x", "members": {"a": "c"}, "thing": 1}]}, "thing = 1"),
        ({"name": "t", "classes": [{"name": "x", "members": {"a": "c"}}] * 2}, "two rows .* are named 'x'"),
        ({"name": "t", "classes": [{"name": "x", "members": {"a": ["c", "c"]}}]}, "in 'x' twice"),
        (
            {"name": "t", "classes": [{"name": n, "members": {"a": "c"}} for n in "xy"]},
            "a \"c\" in both 'x' and 'y'",
        ),
        ({"name": "t", "rename": ["x"]}, "not an object"),
        ({"name": "t", "rename": {"x": "\ud800"}}, "for a name"),
    ],
)
def test_what_a_table_cannot_say(data, match):
    with pytest.raises(UserError, match=match):
        MergeTable.from_dict(data, where="t.json")


def test_files(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"name": "mine", "classes": [{"name": "x", "members": {"a": "cat", "a": "dog"}}]}')
    with pytest.raises(UserError, match="says 'a' twice"):
        MergeTable.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        MergeTable.load(path)
    with pytest.raises(UserError, match=r"no merge table 'comon'.*Did you mean 'common'"):
        MergeTable.load("comon")
    path.write_text('{"cat": "x", "dog": null}')
    assert read_map(str(path), "") == read_map({"cat": "x", "dog": None}, "") == {"cat": "x", "dog": None}
    assert read_map(None, "") == {}
    with pytest.raises(UserError, match="has 3 for a name"):
        read_map({"cat": 3}, "data.sources[0]")  # type: ignore[dict-item]
    with pytest.raises(UserError, match="cannot be read"):
        read_map("nowhere.json", "data.sources[0]")
    check_source(A, None, "")
    check_source(A, "a", "")
    with pytest.raises(UserError, match="packed with vocabulary 'a', not 'b'"):
        check_source(A, "b", "data.sources[0]")
    path.write_text(json.dumps(B.to_dict()))
    check_source(B, str(path), "")
    with pytest.raises(UserError, match="packed with other classes"):
        check_source(A, str(path), "data.sources[0]")


def test_counts_and_bands():
    unified = unify([Source(A, map={"sky": None}), Source(B)], [AB])
    counts = unified_counts(unified, [np.array([5, 100, 7]), np.array([3, 6, 1, 1])])
    assert counts.tolist() == [11, 102, 3]
    assert [c.frequency for c in with_bands(unified.vocabulary, counts).classes] == ["common", "frequent", "rare"]
    edges = with_bands(vocabulary("v", "p q r s"), np.array([1, 10, 100, 101]))
    assert [c.frequency for c in edges.classes] == ["rare", "rare", "common", "frequent"]
    with pytest.raises(UserError, match=r"1 classes of 'unified' have no image.*dog"):
        with_bands(unified.vocabulary, np.array([1, 0, 3]))
    with pytest.raises(UserError, match="a has 3 classes"):
        unified_counts(unified, [np.zeros(2, int), np.zeros(4, int)])


def test_a_band_stays_where_all_members_have_it():
    rare, none = (Vocabulary(n, (ClassInfo("x", True, 1, f),)) for n, f in (("r", "rare"), ("n", None)))
    assert unify([Source(rare)]).vocabulary.classes[0].frequency == "rare"
    assert unify([Source(rare), Source(none)], by_name=True).vocabulary.classes[0].frequency is None


def test_federated_lists_of_folded_classes():
    lvis = vocabulary("l", "red* green* apple* pear*")
    source = unify([Source(lvis)], [table({"pepper": {"l": ["red", "green"]}})]).sources[0]
    none: list[int] = []
    for present, negative, partial, expected in (
        (none, [0, 1], none, ([0], none)),  # both looked for, none there
        (none, [0], none, (none, none)),  # green was not looked for: unknown
        ([0], none, none, (none, [0])),  # red marked, green not looked for
        ([0], [1], none, (none, none)),  # red marked, no green: all pepper is marked
        ([0, 1], none, [1], (none, [0])),
        ([2], [3], none, ([2], none)),
    ):
        absent, unmarked = unified_federation(source, np.array(present), np.array(negative), np.array(partial))
        assert (absent.tolist(), unmarked.tolist()) == expected, (present, negative, partial)


def test_what_is_printed_stays_short_at_twenty_thousand_classes():
    def big(name):
        return Vocabulary(name, tuple(ClassInfo(f"c{i}", True, i) for i in range(20_000)))

    rows = {f"c{i}": {"a": f"c{i}", "b": f"c{i}"} for i in range(10_000)}
    unified = unify([Source(big("a"), "data.sources[0]"), Source(big("b"), "data.sources[1]")], [table(rows)])
    lines = describe(unified, limit=3, whole="all.txt")
    assert "30,000 classes, 10,000 of them of several source classes, 20,000 of one" in lines[0]
    assert "data.sources[1]: b, annotates 20,000 of 30,000 classes" in lines[2]
    assert lines[3:5] == ['  c0 = a "c0" + b "c0"', '  c1 = a "c1" + b "c1"']
    assert lines[6] == "  ... and 9,997 more merges in all.txt"
    assert lines[-1] == "  ... and 9,997 more names in all.txt"
    assert len(lines) == 12
    whole = whole_text(unified)
    assert whole.count("\n") == 20_004
    assert all(line in whole for line in merge_lines(unified))


def bundled() -> dict[str, Vocabulary]:
    names = {v for name in bundled_tables() for v in MergeTable.load(name).vocabularies}
    return {name: Vocabulary.load(FOLDER / f"{name}.json") for name in sorted(names)}


def test_bundled_tables_fit_every_pair_of_their_vocabularies():
    known, tables = bundled(), {name: MergeTable.load(name) for name in bundled_tables()}
    assert set(tables) == {"coco_coarse", "common", "semantic"}
    for chosen in ([], ["semantic"], ["coco_coarse"], ["semantic", "coco_coarse"]):
        for pair in [*combinations(known, 2), tuple(known)]:
            fitting = [tables[name] for name in ["common", *chosen] if tables[name].vocabularies & set(pair)]
            unify([Source(known[name], name) for name in pair], fitting)


def test_bundled_tables_say_what_they_should():
    known = bundled()
    everything = [Source(v) for v in known.values()]
    unified = unify(everything, [MergeTable.load("common")])
    by_name = dict(zip(unified.vocabulary.names, unified.members, strict=True))
    assert len(by_name["person"]) == 8
    assert ("lvis_v1_1203", "wineglass") in by_name["wine glass"]
    assert ("ade20k_full_847", "double door") in by_name["door"]
    for one, other in (  # each is a different thing under one name
        (("lvis_v1_1203", "bat_(animal)"), ("ade20k_full_847", "bat")),
        (("coco_panoptic_133", "keyboard"), ("ade20k_full_847", "keyboard")),
        (("coco_panoptic_133", "tv"), ("ade20k_150", "screen")),
        (("coco_panoptic_133", "potted plant"), ("ade20k_150", "plant")),
        (("coco_panoptic_133", "curtain"), ("ade20k_150", "curtain")),  # stuff, thing
    ):
        assert not any(one in members and other in members for members in unified.members)
    semantic = unify(everything, [MergeTable.load("common"), MergeTable.load("semantic")])
    assert len(dict(zip(semantic.vocabulary.names, semantic.members, strict=True))["curtain"]) == 5
    coco = [Source(known["coco_stuff_171"]), Source(known["coco_panoptic_133"])]
    folded = unify(coco, [MergeTable.load("coco_coarse")])
    assert len(folded.vocabulary) == 133 + 12
    assert folded.sources[1].known.sum() == 133
