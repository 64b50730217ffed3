"""What a test cluster is made of, and the texts of SLURM's own configuration files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NETWORK = "10.77.0"
CONTROLLER = "ctl"


@dataclass(frozen=True)
class Settings:
    """Size and delays (s) of a cluster; each default is the shortest that held on a busy machine with two cores."""

    nodes: int = 3
    gpus: int = 2
    cpus: int = 8
    memory: int = 4000  # MiB, believed by SLURM and not looked at
    grace: int = 15  # between a preemption's first TERM, to the steps, and the second, to everything
    kill_wait: int = 5  # between TERM and KILL
    node_timeout: int = 8  # silence after which a node is DOWN, once the calls to it have failed
    message: int = 10  # for an answer of a daemon; when a busy node is late, the signal sent again hits the next start
    credential: int = 5  # a requeued job waits one second longer than this
    unkillable: int = 30
    proctrack: str = "auto"  # auto: cgroup where a freezer can be written, else linuxproc
    network: bool | None = None  # own network for each node; None: where the kernel allows it

    def __post_init__(self) -> None:
        if self.credential < 5:
            raise ValueError(f"SLURM ignores a cred_expire of {self.credential} and takes its 120 s: 5 at least")


@dataclass(frozen=True)
class Places:
    """The files of one cluster, all in its private folder."""

    folder: Path

    @property
    def conf(self) -> Path:
        return self.folder / "etc/slurm.conf"

    @property
    def hosts(self) -> Path:
        return self.folder / "etc/hosts"

    @property
    def socket(self) -> Path:
        return self.folder / "run/munge.sock"

    def log(self, name: str) -> Path:
        """The log of a daemon: slurmctld, slurmd.NODE, munged, box.NAME."""
        return self.folder / f"log/{name}.log"

    def task_environment(self, node: str) -> Path:
        """What every task that starts on this node gets into its environment."""
        return self.folder / f"task-env/{node}"

    def make(self) -> None:
        """Create the folders; munged wants the way to its socket open to everybody and writable to nobody else."""
        self.folder.chmod(0o755)
        for name in ("etc", "run", "log", "state", "spool", "munge", "dev", "home", "task-env"):
            (self.folder / name).mkdir(mode=0o755)


def hosts_text(nodes: list[str], network: bool, hostname: str) -> str:
    """/etc/hosts of every box."""
    lines = ["127.0.0.1 localhost"]
    if not network:
        return "\n".join([*lines, f"127.0.0.1 {hostname}", *(f"127.0.0.1 {node}" for node in nodes), ""])
    lines.append(f"{address(0)} {CONTROLLER}")
    for number, node in enumerate(nodes, 1):
        # torch looks an address up in the form that IPv6 gives to one of IPv4.
        lines += [f"{address(number)} {node}", f"::ffff:{address(number)} {node}"]
    return "\n".join([*lines, ""])


def address(number: int) -> str:
    """The address of node `number`, counted from 1; 0 is the controller."""
    return f"{NETWORK}.{number or 254}"


def slurm_conf(places: Places, nodes: list[str], settings: Settings, proctrack: str, ports: list[int] | None) -> str:
    """slurm.conf; with `ports` (the controller's, then the nodes') all daemons share this host's loopback."""
    folder = places.folder
    if ports is None:
        where = f"SlurmctldHost={CONTROLLER}({address(0)})\nSlurmctldPort=6817"
        each = [f"NodeName={node} NodeAddr={address(n)} Port=6818" for n, node in enumerate(nodes, 1)]
    else:
        where = (
            f"SlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort={ports[0]}\n"
            "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny"
        )
        each = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            for node, port in zip(nodes, ports[1:], strict=True)
        ]
    machine = f"CPUs={settings.cpus} RealMemory={settings.memory}" + (
        f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
    )
    limits = "DefaultTime=10 MaxTime=120 State=UP"
    return f"""ClusterName=test
{where}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={places.socket},cred_expire={settings.credential}
CredType=cred/munge
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
TaskProlog={folder}/etc/task-prolog
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={places.log("slurmctld")}
SlurmdLogFile={places.log("slurmd.%n")}
SlurmctldDebug=verbose
SlurmdDebug=verbose
LogTimeFormat=iso8601_ms
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={settings.node_timeout}
BatchStartTimeout=60
MessageTimeout={settings.message}
TCPTimeout=1
KillWait={settings.kill_wait}
UnkillableStepTimeout={settings.unkillable}
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT {machine} State=UNKNOWN
{chr(10).join(each)}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={settings.grace} {limits}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF {limits}
"""


def gres_conf(places: Places, nodes: list[str], gpus: int) -> str:
    """gres.conf: devices that exist, as only those give tasks their CUDA_VISIBLE_DEVICES."""
    return "".join(f"NodeName={node} Name=gpu File={places.folder}/dev/gpu{g}\n" for node in nodes for g in range(gpus))


CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"

TASK_PROLOG = """#!/bin/sh
# What this prints in the form "export NAME=VALUE" goes into the task's environment.
[ ! -f "{folder}/task-env/$SLURMD_NODENAME" ] || cat "{folder}/task-env/$SLURMD_NODENAME"
"""
