"""A job by the options that sbatch is given: which machines it asks for, and what Slurm says of it."""

import dataclasses
import re
import shutil
import subprocess
from typing import Self

from vit_nabirds.audit.findings import Findings
from vit_nabirds.errors import ConfigError, UserError, quoted, shown
from vit_nabirds.parallel import accelerators, gpus
from vit_nabirds.parallel.accelerators import Seen

WAIT = 60  # seconds for Slurm's answer
AWAY = re.compile(r"Unable to contact|timed out|connection failure|Zero Bytes|configuration (source|file)", re.I)
STOPPED = 180.0  # seconds before its limit that the scripts of launch/ have a job stopped


@dataclasses.dataclass(frozen=True)
class Job:
    """Options of sbatch by name, without the dashes; none for a job that is not described."""

    options: dict[str, str]

    @classmethod
    def of(cls, texts: list[str]) -> Self:
        """ConfigError for a text that is not like '--nodes=2'. Of an option that comes twice the last one counts."""
        options = {}
        for text in texts:
            if not re.match("--[a-z]", text):
                raise ConfigError(f"--sbatch={shown(text)}: write an option of sbatch like --sbatch=--nodes=2.")
            name, _, value = text[2:].partition("=")
            options.pop(name, None)
            options[name] = value
        return cls(options)

    @property
    def nodes(self) -> int:
        return _number(self.options.get("nodes", "")) or 1  # of '2-4' the first

    @property
    def tasks(self) -> int:
        """Of each node."""
        total = _number(self.options.get("ntasks", ""))
        return -(-total // self.nodes) if total else _number(self.options.get("ntasks-per-node", "")) or 1

    @property
    def gpus_per_node(self) -> tuple[int, str]:
        """How many GPUs of each node it takes, and what Slurm calls them: '' where the options do not say."""
        times = {"gpus-per-node": 1, "gpus-per-task": self.tasks, "gpus": 1 / self.nodes}
        for name, factor in times.items():
            if found := re.fullmatch(r"(?:(\D[^:,]*):)?(\d{1,4})", self.options.get(name, "")):
                return int(int(found[2]) * factor), found[1] or ""
        found = re.search(
            r"(?:^|,)(?:gres[/:])?gpu(?::(\D[^:,]*))?(?::(\d{1,4}))?(?:,|$)", self.options.get("gres", "")
        )
        return (int(found[2] or 1), found[1] or "") if found else (0, "")

    @property
    def leave(self) -> float:
        """Seconds before its limit that the job is stopped."""
        found = re.fullmatch(r"[^@]*@(\d{1,5})", self.options.get("signal", ""))
        return float(found[1]) if found else STOPPED

    @property
    def requeues(self) -> bool:
        return "no-requeue" not in self.options

    def machines(self, described: str | None) -> gpus.Machines | None:
        """The GPUs of the job: described like '2x4 h100', or like 'h100' where the job says how many; or as Slurm calls
        them. None where nothing says which they are."""
        per_node, name = self.gpus_per_node
        described = _known(name) if described is None else described
        if described is None:
            return None
        machines = gpus.parse(described)
        if per_node and machines.size == 1:
            return gpus.parse(f"{self.nodes}x{per_node} {described.split()[-1]}")
        return machines

    def devices(self, cpu_devices: int) -> int:
        """That the job trains on: GPUs, or without them the parts of each task's CPU."""
        return self.nodes * (self.gpus_per_node[0] or self.tasks * cpu_devices)


def _known(name: str) -> str | None:
    """The GPU that Slurm calls 'h100' or 'nvidia_a100-sxm4-80gb'; None for a part of one, and for 'a100', of which
    there are two."""
    words = set(re.findall(r"[a-z]+\d+[a-z]*|\d+", name.lower().replace("gb", "")))
    known = [kind for kind in gpus.GPUS if set(kind.split("-")) <= words]
    return known[0] if known and not re.search(r"\dg\.", name) else None


def _number(text: str) -> int:
    found = re.match(r"\d{1,6}", text)
    return int(found[0]) if found else 0


def of_tasks(job: Job, allow_idle: bool = False) -> Findings:
    """Whether the tasks of a node can share its GPUs, as they will when they start."""
    per_node, _ = job.gpus_per_node
    if not per_node or "gpus-per-task" in job.options:
        return Findings()
    seen = [Seen("a node", [f"GPU {number}" for number in range(per_node)])] * job.tasks
    try:
        accelerators.share(seen, allow_idle)
    except UserError as error:
        return Findings(problems=[str(error)])
    return Findings()


def of_slurm(job: Job) -> Findings:
    """What Slurm says of the job, without submitting it."""
    if not job.options:
        return Findings()
    if not shutil.which("sbatch"):
        return Findings(warnings=["there is no sbatch here, so nobody has said whether Slurm would take the job."])
    options = [f"--{name}={value}" if value else f"--{name}" for name, value in job.options.items()]
    try:
        command = ["sbatch", "--test-only", *options, "--wrap=true"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=WAIT)
    except subprocess.TimeoutExpired:
        return Findings(warnings=[f"Slurm has not said within {WAIT} s whether it would take the job."])
    said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
    start = [re.sub(r".*Job \S+ to start", "the job would start", line) for line in said if " to start at " in line]
    if done.returncode == 0:
        return Findings([f"slurm        {quoted((start or said or ['the job would be taken'])[0])}"])
    reason = quoted("; ".join(dict.fromkeys(said)), 500)
    if AWAY.search(reason):
        return Findings(warnings=[f"Slurm does not answer, so it may refuse the job: {reason}"])
    return Findings(problems=[f"Slurm would refuse the job: {reason}. Change sbatch's options."])
