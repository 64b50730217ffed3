"""The doctor's checks as functions of facts: one broken situation each, and what is said of it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mf_scale.config.schema import Config, DataConfig, TrackingConfig
from mf_scale.data.index import Index
from mf_scale.data.sources import open_training, open_validation
from mf_scale.doctor import page
from mf_scale.doctor.batch import judge_batch
from mf_scale.doctor.clocks import judge_clocks
from mf_scale.doctor.collectives import bus_bandwidth, judge_collectives
from mf_scale.doctor.finding import OK, PROBLEM, WARNING, Finding, exit_code, looked
from mf_scale.doctor.host import judge_hosts, needs_of
from mf_scale.doctor.kernels import judge_kernels, kernel_facts
from mf_scale.doctor.labels import judge_labels, judge_vocabularies
from mf_scale.doctor.memory import memory_facts
from mf_scale.doctor.run_directory import directory_facts, judge_file_clock, judge_room, judge_writes
from mf_scale.doctor.service import judge_service
from mf_scale.doctor.shards import judge_shards, shard_facts
from mf_scale.doctor.versions import judge_versions, version_facts
from mf_scale.doctor.watch import Watch, within
from mf_scale.errors import FaultError, UserError

GIB = 2**30


def only(findings: list[Finding], level: str, said: str) -> Finding:
    """The one finding of a list: of this level, with this in its text, and with a remedy where something is wrong."""
    assert [finding.level for finding in findings] == [level], findings
    assert said in findings[0].text, findings[0].text
    assert findings[0].remedy or level == OK
    return findings[0]


def configured(packed: Path, **train: Any) -> Config:
    config = Config(data=DataConfig(train=str(packed / "train"), val=str(packed / "val")))
    return replace(config, train=replace(config.train, **train))


# -- what a problem means


def test_exit_codes_tell_mistakes_faults_and_warnings_apart() -> None:
    fine, warned = Finding("a", OK, "x"), Finding("b", WARNING, "y", "z")
    mistake, fault = Finding("c", PROBLEM, "m", "z"), Finding("d", PROBLEM, "f", "z", fault=True)
    assert exit_code([fine, warned]) == exit_code([fine, warned], in_job=True) == 0
    assert exit_code([fault]) == exit_code([mistake, fault]) == 1
    assert exit_code([fault, warned], in_job=True) == 75
    assert exit_code([fault, mistake], in_job=True) == 2, "another try would not mend the mistake"


def test_a_check_that_breaks_is_a_warning_and_one_that_refuses_a_problem() -> None:
    def refuses() -> list[Finding]:
        raise UserError("no such thing", where="there", remedy="Mend it.")

    assert only(looked("x", refuses), PROBLEM, "no such thing (there)").remedy == "Mend it."
    only(looked("x", lambda: [Finding("x", OK, str(1 // 0))]), WARNING, "ZeroDivisionError")

    def fails() -> list[Finding]:
        raise FaultError("the server is gone", remedy="Wait.")

    assert looked("x", fails)[0].fault and not looked("x", refuses)[0].fault


def test_what_hangs_is_left_behind_and_named() -> None:
    began = time.monotonic()
    with pytest.raises(FaultError, match=r"the tape did not answer within 0\.1 s"):
        within(0.1, "the tape", lambda: time.sleep(5))
    assert within(5, "the disk", lambda: 7) == 7 and time.monotonic() - began < 3
    with pytest.raises(UserError, match="gone"):
        within(5, "the disk", lambda: (_ for _ in ()).throw(UserError("gone")))
    stages: list[str] = []
    watch = Watch(0.1, stages.append)
    with watch.at("collectives"):
        time.sleep(0.4)
    ended = Watch(0.1, stages.append)
    ended.end()
    time.sleep(0.3)
    assert stages == ["collectives"]


def test_the_page_has_a_line_a_check_and_a_job_hears_what_is_wrong_alone() -> None:
    heading = page.Heading("c.yaml", 8, ("n1", "n2"), 3.2)
    findings = [Finding("batch", OK, "fine so", details={"a": 1}), Finding("room", PROBLEM, "too full", "Make room.")]
    text = page.page(heading, findings, verbose=False)
    assert "✓ batch          fine so\n✗ room           too full\n                 → Make room." in text
    assert text.endswith("1 problem, 1 fine") and "a: 1" not in text
    assert "a: 1" in page.page(heading, findings, verbose=True)
    job = page.job_page(heading, findings, verbose=False).splitlines()
    assert job[0] == "mf-scale doctor · c.yaml · 8 ranks on n1, n2 · 3.2 s: 1 problem, 1 fine" and len(job) == 3
    assert len(page.job_page(heading, findings[:1], verbose=False).splitlines()) == 1
    told = json.loads(page.as_json(heading, findings, in_job=True))
    assert (told["exit_code"], told["problems"], told["findings"][1]["fault"]) == (2, 1, False)


# -- versions, kernels, nodes


def test_a_node_with_another_version_is_named() -> None:
    mine = version_facts()
    reports: list[dict[str, Any]] = [{"rank": r, "host": f"n{r}", "versions": dict(mine)} for r in range(3)]
    assert mine["torch"] in only(judge_versions(reports, "575.1"), OK, "driver 575.1").text
    reports[1]["versions"]["torch"] = "1.0"
    only(
        judge_versions(reports),
        PROBLEM,
        f"n1 runs something else than the others: torch 1.0 instead of {mine['torch']}",
    )


def test_kernels_are_those_of_training_and_nodes_that_differ_are_named() -> None:
    import torch

    facts = kernel_facts(Config(), torch.device("cpu"))
    assert facts["attention"] == "sdpa" and facts["loss"] in ("native", "eager")
    reports = [{"host": f"n{n}", "kernels": {**facts, "loss": "native", "loss_reason": ""}} for n in range(3)]
    only(judge_kernels(reports), OK, "attention sdpa · matching and mask loss native")
    reports[2]["kernels"] = {**facts, "loss": "eager", "loss_reason": "no compiler"}
    only(judge_kernels(reports), WARNING, "eager on n2, native elsewhere (no compiler)")
    forced = Config()
    forced = replace(forced, loss=replace(forced.loss, kernels="triton"))
    with pytest.raises(UserError, match="they are for cuda"):
        kernel_facts(forced, torch.device("cpu"))
    refused = [{"host": "n0", "kernels": {"error": ["cannot run", "loss.kernels", "Use auto."]}}]
    assert only(judge_kernels(refused), PROBLEM, "cannot run (loss.kernels)").remedy == "Use auto."


def node(files: int = 65536, shm: int = 8 * GIB, total: int = 64 * GIB, free: int = 32 * GIB) -> dict[str, Any]:
    return {
        "files": files,
        "files_hard": 65536,
        "shm": {"total": shm, "free": shm},
        "memory": {"total": total, "free": free},
    }


def test_limits_of_a_node_are_held_against_what_its_ranks_take() -> None:
    config = Config()
    needs = needs_of(config, batch_of_a_rank=16, checkpoint=GIB, trainable=10**8)
    assert needs.buffers == 2 * 256 * 2**20 and needs.snapshot == GIB and needs.offload == 0
    assert needs.batches == 2 * 2 * 8 * 512 * 512 * 5  # workers x steps ahead x samples of a part
    ranks: list[dict[str, Any]] = [{"host": "n1", "node": node()}, {"host": "n1"}, {"host": "n2", "node": node()}]
    assert {finding.level for finding in judge_hosts(ranks, needs)} == {OK}
    few: list[dict[str, Any]] = [{"host": "n1", "node": node(files=1024)}]
    assert next(f for f in judge_hosts(few, needs) if f.level == WARNING).text.startswith(
        "a process may open 1,024 files on n1"
    )
    docker: list[dict[str, Any]] = [{"host": "n1", "node": node(shm=64 * 2**20)}, {"host": "n1"}]
    problems = [f for f in judge_hosts(docker, needs) if f.level == PROBLEM]
    assert "they would die of a bus error" in problems[0].text and "--shm-size" in problems[0].remedy
    small: list[dict[str, Any]] = [{"host": "n1", "node": node(total=GIB, free=GIB)}, {"host": "n1"}]
    assert next(f.text for f in judge_hosts(small, needs) if f.level == WARNING).endswith("1 GiB are free")
    lean = replace(needs, snapshot=0)  # the buffers of one rank would fit
    assert [f.level for f in judge_hosts(small[:1], lean) if f.check == "host memory"] == [OK]
    assert [f.level for f in judge_hosts(small, lean) if f.check == "host memory"] == [WARNING]
    busy: list[dict[str, Any]] = [{"host": "n1", "node": node(free=GIB)}, {"host": "n1"}]
    assert [f.check for f in judge_hosts(busy, needs) if f.level == WARNING] == ["host memory"]
    assert {finding.level for finding in judge_hosts(busy, None)} == {OK}, "nothing is wanted without a configuration"


@pytest.mark.parametrize("version", [1, 2])
def test_a_cgroup_bounds_the_memory(tmp_path: Path, version: int) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100000 kB\nMemFree: 1 kB\nMemAvailable: 80000 kB\n")
    assert memory_facts(tmp_path) == {"total": 100000 * 1024, "free": 80000 * 1024}
    line, base = ("0::/job/step", "sys/fs/cgroup") if version == 2 else ("4:memory:/job/step", "sys/fs/cgroup/memory")
    (tmp_path / "proc/self/cgroup").write_text(f"{line}\n")
    folder = tmp_path / base / "job"  # the limit is the job's, the process sits in its step
    (folder / "step").mkdir(parents=True)
    names = ("memory.max", "memory.current", "inactive_file")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, used, cache = names if version == 2 else old
    (folder / limit).write_text("10240000\n")
    (folder / used).write_text("4096000\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache} 1024000\n")
    (folder / "step" / limit).write_text("max\n" if version == 2 else "9223372036854771712\n")
    assert memory_facts(tmp_path) == {"total": 10240000, "free": 10240000 - 3072000}


# -- data


def test_a_byte_of_a_shard_that_changed_and_a_shard_that_is_gone_are_named(packed: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in (packed / "train").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    index = Index.open(source)
    whole = shard_facts([index], "1")
    assert whole["checked"] == whole["shards"] == len(index.shards) and not whole["wrong"]
    only(judge_shards([{"host": "n1", "shards": whole}]), OK, "there, 1 checksums right")
    shard = source / index.shards[0].name
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    altered = shard_facts([index], "1")
    found = only(judge_shards([{"host": "n1", "shards": altered}]), PROBLEM, "has another checksum: it was altered")
    assert index.shards[0].name in found.text and not found.fault
    only(judge_shards([{"host": "n1", "shards": altered}], goes_on=True), WARNING, "it was altered")
    shard.write_bytes(data[:-512])
    only(judge_shards([{"host": "n1", "shards": shard_facts([index], "1")}]), PROBLEM, f"instead of {len(data):,}")
    shard.unlink()
    gone = shard_facts([index], "1")
    assert not only(judge_shards([{"host": "n1", "shards": gone}]), PROBLEM, "is missing or unreadable").fault
    # What other nodes see is a mount that this one lacks, so another node may do.
    apart = judge_shards([{"host": "n1", "shards": gone}, {"host": "n2", "shards": whole}])
    assert only(apart, PROBLEM, "on n1").fault
    away, other = ["/x", "no index", "/x/index.json", "Pack it.", False], ["/y", "no task", "/y", "Take it.", False]
    blind = judge_shards([{"host": "n1", "shards": {"errors": [away]}}, {"host": "n2", "shards": whole}])
    assert only(blind, PROBLEM, "n1 cannot open a source that the other nodes can: no index (/x/index.json)").fault
    both = {"host": "n1", "shards": {"errors": [away, other, away]}}
    for reports in ([both], [both, {**both, "host": "n2"}]):
        assert [(f.text, f.remedy, f.fault) for f in judge_shards(reports)] == [
            ("no index (/x/index.json)", "Pack it.", False),
            ("no task (/y)", "Take it.", False),
        ]
    mixed = judge_shards([{"host": "n1", "shards": {**gone, "errors": [other]}}])
    assert [f.text.split()[0] for f in mixed] == ["no", "1"], "the other sources are looked at all the same"
    late = [["", "the shards did not answer", "", "Look.", True]]
    apart = judge_shards([{"host": "n1", "shards": {"errors": late}}, {"host": "n2", "shards": whole}])
    assert only(apart, PROBLEM, "n1: the shards did not answer").fault


def test_no_time_for_checksums_is_said(packed: Path) -> None:
    index = Index.open(packed / "train")
    facts = shard_facts([index], "1", read=-1.0)
    assert facts["checked"] == 0 and facts["sized"] == len(index.shards)
    only(judge_shards([{"host": "n1", "shards": facts}]), OK, "none small enough")


def test_labels_are_held_against_vocabulary_task_and_validation(packed: Path) -> None:
    config = configured(packed)
    training, validation = open_training(config.data), open_validation(config.data)
    assert validation is not None
    found = judge_labels(config, training, validation)
    counts = training[0].class_counts()
    absent = int((counts == 0).sum())
    assert [f.level for f in found] == [WARNING, WARNING]
    assert found[0].text.startswith(f"{absent} of {len(counts)} classes are in no training image: ")
    unseen = int(((counts == 0) & (validation.class_counts() > 0)).sum())
    assert found[1].text.startswith(f"{unseen} classes of the validation images are in no training image: ")
    both = judge_labels(config, (*training, validation), validation)
    assert len(both) == 1 and both[0].details["absent"] == absent - unseen
    wrong = replace(config, model=replace(config.model, num_classes=20))
    only(
        looked("labels", lambda: judge_labels(wrong, training, None)), PROBLEM, "model.num_classes = 20, but vocabulary"
    )


def test_what_keeps_sources_from_one_vocabulary_is_told_of_labels(packed: Path) -> None:
    config = configured(packed)
    training = open_training(config.data)
    config.data.bands = True
    found = only(looked("labels", lambda: judge_labels(config, training, None)), PROBLEM, "and so no frequency band")
    assert not found.fault
    mistake: list[object] = ["two maps differ", "data.sources", "Mend one.", False]
    hosts = [{"host": "n1", "vocabularies": [mistake]}, {"host": "n2", "vocabularies": [mistake]}]
    assert not only(judge_vocabularies(hosts), PROBLEM, "two maps differ (data.sources)").fault
    hosts[1]["vocabularies"] = []
    assert only(judge_vocabularies(hosts), PROBLEM, "n1: two maps differ").fault, "a table that is not the others'"
    assert judge_vocabularies([{"host": "n1"}, {"host": "n2", "vocabularies": []}]) == []


def test_a_batch_that_ranks_cannot_share_is_refused_with_the_numbers_that_can(packed: Path) -> None:
    config = configured(packed, global_batch=12, micro_batch=4, steps=100)
    sources = open_training(config.data)
    only(
        judge_batch(config, 3, sources), OK, "12 = 4 x 1 accumulated x 3 ranks, 100 steps are 30.0 epochs of 40 images"
    )
    found = only(looked("batch", lambda: judge_batch(config, 5, sources)), PROBLEM, "cannot be shared by 5 ranks")
    assert "Start 1 or 2 or 3 or 4 or 6 or 12 ranks" in found.remedy
    only(judge_batch(replace(config, train=replace(config.train, micro_batch=5)), 3), WARNING, "4 are taken")


# -- the run directory


def test_a_run_directory_is_tried_and_nothing_stays(tmp_path: Path) -> None:
    facts = directory_facts(tmp_path / "runs/new", most=1 << 20)
    assert facts["place"] == str(tmp_path) and not facts["there"] and facts["wrote"] == 1 << 20 and not facts["error"]
    assert abs(facts["ahead"]) < 1 and not list(tmp_path.iterdir())
    config = Config()
    only(judge_writes([{"host": "n1", "directory": facts}], GIB, config), OK, "(where it will be made): writes")
    slow = {**facts, "wrote": 1 << 20, "seconds": 1.0}
    found = only(judge_writes([{"host": "n1", "directory": slow}], GIB, config), WARNING, "takes about 1024 s")
    assert "train.stop_before=42.7 and --signal=B:USR1@3072" in found.remedy
    only(judge_file_clock([{"host": "n1", "directory": facts}]), OK, "within 0.1 s")
    skewed = [{"host": "n1", "directory": facts}, {"host": "n2", "directory": {**facts, "ahead": -61.0}}]
    only(judge_file_clock(skewed), WARNING, "61 s behind that of n2")


def test_a_directory_that_cannot_be_written_is_a_mistake_or_a_sick_node() -> None:
    facts = directory_facts(Path("/proc/mf_scale"))
    assert facts["error"]
    there = {"place": "/runs", "there": True, "error": "", "errno": 0, "wrote": 1 << 20, "seconds": 0.1, "ahead": 0.0}
    denied = {**there, "error": "Permission denied", "errno": 13}
    config = Config()
    assert not only(judge_writes([{"host": "n1", "directory": denied}], 0, config), PROBLEM, "Permission denied").fault
    apart = [{"host": "n1", "directory": there}, {"host": "n2", "directory": denied}]
    assert only(judge_writes(apart, 0, config), PROBLEM, "on n2, while the other nodes can").fault
    full = only(
        judge_writes([{"host": "n1", "directory": {**there, "error": "full", "errno": 28}}], 0, config), PROBLEM, "full"
    )
    assert full.fault and "Free some space" in full.remedy


def test_room_is_held_against_what_will_be_kept() -> None:
    facts = {"place": "/runs", "free": 10 * GIB, "files_free": 10**6, "error": ""}
    config = Config()  # keep_last = 3, the best, and one that is being written

    def room(checkpoint: int, held: int = 0, goes_on: bool = False) -> list[Finding]:
        return judge_room(facts, checkpoint, held, config, goes_on=goes_on)

    only(room(2 * GIB), OK, "10 GiB free for 5 checkpoints of 2 GiB")
    assert not only(room(3 * GIB), PROBLEM, "need 15 GiB").fault
    only(room(3 * GIB, held=6 * GIB), OK, "free")
    only(room(3 * GIB, held=3 * GIB, goes_on=True), WARNING, "need 12 GiB more")
    assert only(room(11 * GIB, goes_on=True), PROBLEM, "not one checkpoint of 11 GiB").fault
    only(judge_room({**facts, "files_free": 7}, GIB, 0, config, goes_on=False), WARNING, "room for 7 files")


@pytest.mark.skipif(not Path("/proc/self/ns/mnt").exists(), reason="no namespaces here")
def test_a_full_disk_is_met_on_a_real_file_system(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True, timeout=20).returncode:
        pytest.skip("no root, or no mount namespaces")
    code = (
        "import json, sys; from pathlib import Path; from mf_scale.doctor.run_directory import directory_facts\n"
        "place = Path(sys.argv[1]); (place / 'other').write_bytes(b'x' * (4 << 20))\n"
        "try: (place / 'more').write_bytes(b'x' * (4 << 20))\n"
        "except OSError: pass\n"
        "print(json.dumps(directory_facts(place)))"
    )
    # The mount lives and dies with the command's own namespace.
    script = 'mount -t tmpfs -o size=5m doctor "$1" && exec "$2" -c "$3" "$1"'
    words = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable, code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["total"] == 5 << 20 and facts["free"] == 0, facts
    findings = judge_writes([{"host": "n1", "directory": facts}], 0, Config())
    assert only(findings, PROBLEM, "No space left on device").fault and not list(tmp_path.iterdir())


# -- all ranks


def measured(rank: int, host: str, times: list[float], link: float = 1e-3, ahead: float = 0.0) -> dict[str, Any]:
    clocks = [1000.0 + n + ahead for n in range(5)]
    told = {"backend": "nccl", "all_reduce": {"4096": times, "1048576": times}, "ring": [2**20, link], "clocks": clocks}
    return {"rank": rank, "host": host, "collectives": told}


def test_the_rank_that_all_others_wait_for_is_named() -> None:
    ranks: list[dict[str, Any]] = [measured(r, f"n{r // 2}", [0.010, 0.011, 0.012]) for r in range(4)]
    only(judge_collectives(ranks), OK, "nccl: 1 MiB in 10.0 ms (150 MiB/s)")
    assert bus_bandwidth(ranks, 2**20) == pytest.approx(1.5 * 2**20 / 0.010)
    for report in (ranks[0], ranks[1], ranks[3]):
        report["collectives"]["all_reduce"]["1048576"] = [0.9, 0.8, 0.9]
    found = only(judge_collectives(ranks), WARNING, "all ranks wait 0.89 s for rank 2 on n1")
    assert found.remedy.endswith("--exclude=n1.")
    ranks[0]["collectives"]["all_reduce"]["1048576"] = [0.9, 0.011, 0.012]  # late once is nobody's fault
    once = [measured(r, "n0", [0.9 if r else 0.01, 0.01, 0.01]) for r in range(4)]
    assert [f.level for f in judge_collectives(once)] == [OK]
    assert judge_collectives(ranks[:1]) == [] == judge_clocks(ranks[:1])


def test_a_slow_link_is_compared_with_links_of_its_kind() -> None:
    # Within a host a hundred times faster than between: that is no fault of the network.
    ranks: list[dict[str, Any]] = [
        measured(r, f"n{r // 2}", [0.01] * 3, link=1e-3 if r % 2 == 0 else 1e-5) for r in range(6)
    ]
    assert [f.level for f in judge_collectives(ranks)] == [OK]
    ranks[4]["collectives"]["ring"][1] = 5e-3
    found = only(
        judge_collectives(ranks), WARNING, "rank 3 on n1 to rank 4 on n2, carries 200 MiB/s; the best of its kind 1,"
    )
    assert found.details["receiver"] == 4


def test_clocks_that_differ_are_named_by_how_much() -> None:
    ranks: list[dict[str, Any]] = [measured(r, f"n{r}", [0.01] * 3, ahead=0.02 * r) for r in range(3)]
    only(judge_clocks(ranks), OK, "within 0.040 s")
    ranks[2] = measured(2, "n2", [0.01] * 3, ahead=-2.5)
    only(judge_clocks(ranks), WARNING, "the clock of n2 is 2.5 s behind that of n0")
    ranks[2] = measured(2, "n2", [0.01] * 3, ahead=60)
    only(judge_clocks(ranks), PROBLEM, "60.0 s ahead of")


def test_wandb_is_information() -> None:
    def said(mode: str, **environment: str) -> Finding:
        return judge_service(TrackingConfig(wandb=mode), environment)[0]

    assert said("auto").text.startswith("offline: no WANDB_API_KEY") and said("disabled").level == OK
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert said("auto", WANDB_API_KEY="k" * 40, WANDB_BASE_URL=url).text == "online at 127.0.0.1, which answers"
    away = said("auto", WANDB_API_KEY="k" * 40, WANDB_BASE_URL=url)
    assert away.level == OK and "is not reached from here" in away.text and "kkk" not in away.text
    assert said("online", WANDB_API_KEY="k" * 40, WANDB_BASE_URL=url).level == WARNING
