"""Verify finds what is wrong with a source, all of it, and tells it in text and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from data_tools.__main__ import main
from data_tools.files import file_checksum
from mf_scale.data.index import COLUMNS, HEAD, Index, head_digest
from tests.servers import NGINX, free_port, nginx
from tests.sources import changed_bytes, make_source
from tests.unit.packing import VOCABULARY, copy_of, pack


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "val"
    assert pack(target, "--shard-size", "5") == 0
    return target


def verify(source: Path | str, report: Path, workers: int = 1) -> tuple[int, dict]:
    code = main(["verify", str(source), "--json", str(report), "--workers", str(workers)])
    return code, json.loads(report.read_text())


def rewrite_columns(folder: Path, change) -> None:
    """Other rows, under a head that vouches for them."""
    with pa.OSFile(str(folder / COLUMNS), "rb") as file:
        table = change(pa.ipc.open_file(file).read_all())
    with pa.OSFile(str(folder / COLUMNS), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    head = json.loads((folder / HEAD).read_text())
    head["columns"] |= {"size": (folder / COLUMNS).stat().st_size, "sha256": file_checksum(folder / COLUMNS)}
    (folder / HEAD).write_text(json.dumps({**head, "digest": head_digest(head)}))


def set_value(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    field = table.schema.field(column)
    return table.set_column(table.schema.get_field_index(column), field, pa.array(values, field.type))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sound_source_is_said_to_be(packed, tmp_path, capsys, workers):
    code, report = verify(packed, tmp_path / "r.json", workers)
    assert code == 0 and "3 shards and 13 samples are sound" in capsys.readouterr().out
    assert report["sound"] and report["findings"] == [] and report["digest"] == Index.open(packed).digest


def test_everything_is_found_at_once(packed, tmp_path, capsys):
    broken = copy_of(packed, tmp_path / "broken")
    (broken / "val-000000.tar").unlink()
    with (broken / "val-000002.tar").open("ab") as file:
        file.write(bytes(512))
    record = Index.open(broken).sample(6)
    data = bytearray((broken / "val-000001.tar").read_bytes())
    data[record.offset + 520 : record.offset + 600] = bytes(80)
    (broken / "val-000001.tar").write_bytes(data)
    code, report = verify(broken, tmp_path / "r.json", workers=2)
    said = capsys.readouterr().err
    assert code == 2 and "1 of 13 samples are not sound" in said and "Traceback" not in said
    assert report["counts"] == {
        "shards that are missing or cannot be read": 1,
        "samples that do not decode": 1,
        "shards with another checksum": 1,
        "shards of another size": 1,
    }
    assert all(f"{kind}: {count} (" in said for kind, count in report["counts"].items())
    bad = next(finding for finding in report["findings"] if finding["sample"] is not None)
    assert (bad["key"], bad["shard"], bad["sample"], bad["offset"]) == (record.key, record.shard, 6, record.offset)
    assert "does not decode" in bad["reason"]
    # indexed as it is now, the checksums fit and the image is found not to decode
    (broken / "val-000002.tar").unlink()
    assert main(["index", str(broken), "--vocabulary", str(VOCABULARY)]) == 2
    assert main(["index", str(broken), "--vocabulary", str(VOCABULARY), "--overwrite"]) == 0
    assert verify(broken, tmp_path / "r.json")[1]["counts"] == {"samples that do not decode": 1}


def test_samples_behind_the_cut_of_a_shard_are_named_and_those_before_it_read(packed, tmp_path):
    broken = copy_of(packed, tmp_path / "broken")
    record = Index.open(broken).sample(7)
    path = broken / record.shard
    path.write_bytes(path.read_bytes()[: record.offset + 1000])
    code, report = verify(broken, tmp_path / "r.json")
    kinds = {finding["sample"]: finding["kind"] for finding in report["findings"]}
    outside = "samples that lie outside of their shard"
    assert code == 2 and kinds == {None: "shards of another size", 7: outside, 8: outside, 9: outside}


def test_rows_that_are_not_true_are_found(packed, tmp_path):
    changes = {1: ("height", 7), 4: ("segments", 99), 8: ("class_ids", [1, 2])}
    broken = copy_of(packed, tmp_path / "broken")

    def change(table):
        for row, (column, value) in changes.items():
            table = set_value(table, column, row, value)
        return table

    rewrite_columns(broken, change)
    _, report = verify(broken, tmp_path / "r.json")
    assert {finding["sample"] for finding in report["findings"]} == changes.keys()
    assert report["counts"] == {"samples that the index describes wrongly": 3}


def test_double_keys_and_changed_columns_are_found(packed, tmp_path):
    broken = copy_of(packed, tmp_path / "broken")
    keys = Index.open(broken).table["key"].to_pylist()
    rewrite_columns(broken, lambda table: set_value(table, "key", 3, keys[10]))
    _, report = verify(broken, tmp_path / "r.json")
    assert report["counts"] == {"keys that stand twice in the index": 1}
    columns = broken / COLUMNS
    with changed_bytes(columns, columns.stat().st_size // 2, b"\x55" * 8):
        assert verify(broken, tmp_path / "r.json")[1]["counts"] == {"columns of the index that were changed": 1}


def test_labels_outside_the_vocabulary_are_found(tmp_path):
    make_source(tmp_path / "source", [3])
    shard = tmp_path / "source" / "part-000.tar"
    place = shard.read_bytes().index(b'"label": 5')
    with changed_bytes(shard, place, b'"label": 7'):
        code, report = verify(tmp_path / "source", tmp_path / "r.json")
    assert code == 2
    assert ["label 7 is outside the vocabulary" in f["reason"] for f in report["findings"]] == [True, False]


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_a_source_on_a_server_is_verified(packed, tmp_path, capsys):
    (tmp_path / "server").mkdir()
    root = copy_of(packed, tmp_path / "root")
    with nginx(root, tmp_path / "server", free_port()) as url:
        assert verify(url, tmp_path / "r.json", workers=2)[0] == 0
        assert "13 samples are sound" in capsys.readouterr().out
        (root / "val-000001.tar").unlink()
        assert verify(url, tmp_path / "r.json")[1]["counts"] == {"shards that are missing or cannot be read": 1}
