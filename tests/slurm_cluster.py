"""A real SLURM of one node on this machine, with folders, ports and keys of its own; it ends with its process.

    python tests/slurm_cluster.py bash     # a shell in which sbatch and `python main.py -m sweep=submitit` work

Debian's packages slurm-wlm and munge, and root, are needed; no systemd, no control groups, no accounting.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
CredType=cred/munge
# a job that is queued again waits for as long as a credential lasts, which is two minutes elsewhere
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
KillWait=10
SlurmdTimeout=10
SchedulerParameters=sched_interval=2,batch_sched_delay=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
SlurmdParameters=config_overrides
"""


def why_not() -> str:
    """What is missing here; empty: nothing is."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    missing = [name for name in NEEDED if not shutil.which(name, path=path)]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.getuid() == 0 else "SLURM's daemons are started as root"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


class Slurm:
    """The cluster.

    Args:
        folder: its own, new.

    Attributes:
        environment: for what is to find it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        ours = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment = {**inherited, **ours}
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        host = socket.gethostname().partition(".")[0]
        values = {"host": host, "folder": folder, "ports": _free_ports(2), "memory": memory}
        (folder / "slurm.conf").write_text(CONF.format(**values))
        self.host = host
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start its daemons, and wait until the node takes jobs."""
        folder = self.folder
        self.run("mungekey", "--create", f"--keyfile={folder}/munge.key")
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
            f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munged.log",
        )  # fmt: skip
        self._wait_for(lambda: (folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        self.start_node()

    def start_node(self) -> None:
        """Start the node's daemon, for the first time or again."""
        self._daemon("slurmd", "-D")
        self._wait_for(
            lambda: self.say("sinfo", "--noheader", "--format=%T").split()[:1] in (["idle"], ["mixed"]),
            "slurmd",
        )

    def lose_node(self) -> None:
        """Kill the node: its daemon and all that it started."""
        tree = [self._daemons.pop("slurmd").pid]
        for pid in tree:
            tree += _children(pid)
        everything = {*tree, *self._steps()}
        for pid in everything:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _steps(self) -> list[int]:
        """The daemons of job steps, which live on without the node's, and what they started."""
        found = []
        for line in self.say("scontrol", "listpids").splitlines()[1:]:
            pid = line.split()[0]
            found += [int(pid)] if pid.isdigit() and int(pid) > 1 else []
        listed = subprocess.run(
            ["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True
        ).stdout
        for line in listed.splitlines():
            pid, _, name = line.strip().partition(" ")
            if name.startswith("slurmstepd") and self._is_ours(int(pid)):
                found.append(int(pid))
        for pid in found:
            found += [child for child in _children(pid) if child not in found]
        return found

    def _is_ours(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return str(self.folder) in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return False

    def close(self) -> None:
        """End all of it."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root")
            self._wait_for(lambda: not self.say("squeue", "--noheader"), "the jobs' end", 20)
        for name in ("slurmd", "slurmctld", "munged"):
            daemon = self._daemons.pop(name, None)
            if daemon is not None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def run(self, *command: str) -> None:
        """Run one of its commands.

        Raises:
            subprocess.SubprocessError: where it fails.
        """
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=60)

    def say(self, *command: str) -> str:
        """What one of its commands prints; empty where it fails."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            self._daemons[command[0]] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def _wait_for(self, condition, what: str, timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise subprocess.SubprocessError(
                    f"{what}: not within {timeout} s; {self.folder} has its logs"
                )
            time.sleep(0.1)


def _children(pid: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(number) for number in listed.stdout.split()]


@contextlib.contextmanager
def slurm() -> Iterator[Slurm]:
    """A cluster for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        cluster = Slurm(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.close()


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    with slurm() as cluster:
        sys.exit(subprocess.call(sys.argv[1:] or ["sinfo"], env=cluster.environment))
