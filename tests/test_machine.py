"""What a job was given of its machine: by affinity, and by control groups of both versions."""

import os
import subprocess
import sys

import pytest

from zoo import machine


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")


JOB = "system.slice/job"
HOSTS = {
    "version 2, quota of the group above": ({
        "proc/self/cgroup": f"0::/{JOB}", f"sys/fs/cgroup/{JOB}/cpu.max": "max 100000",
        "sys/fs/cgroup/system.slice/cpu.max": "150000 100000", f"sys/fs/cgroup/{JOB}/memory.max": "2000000000",
        "sys/fs/cgroup/memory.max": "max",
    }, 1.5, 2_000_000_000),
    "version 2, the container's own group is the top": ({
        "proc/self/cgroup": "0::/docker/0123", "sys/fs/cgroup/cpu.max": "400000 100000",
        "sys/fs/cgroup/memory.max": "4000000000",
    }, 4.0, 4_000_000_000),
    "version 1": ({
        "proc/self/cgroup": f"4:memory:/{JOB}\n2:cpu,cpuacct:/{JOB}\n0::/",
        f"sys/fs/cgroup/cpu,cpuacct/{JOB}/cpu.cfs_quota_us": "50000",
        f"sys/fs/cgroup/cpu,cpuacct/{JOB}/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        f"sys/fs/cgroup/memory/{JOB}/memory.limit_in_bytes": "1000000000",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }, 0.5, 1_000_000_000),
    "no limits": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None, None),
    "no control groups": ({}, None, None),
}


@pytest.mark.parametrize("host", HOSTS)
def test_limits_of_control_groups_are_found(tmp_path, host):
    # Given a machine's files, then the tightest limit at or above this process's group is known.
    files, quota, limit = HOSTS[host]
    write(tmp_path, files)
    assert min(machine._cpu_quotas(tmp_path), default=None) == quota
    assert min(machine._memory_limits(tmp_path), default=None) == limit


def test_part_of_a_core_is_one_core_and_the_machine_bounds_all(monkeypatch):
    monkeypatch.setattr(machine, "_cpu_quotas", lambda: [0.5])
    monkeypatch.setattr(machine, "_memory_limits", lambda: [123, 2**63])
    assert (machine.cores(), machine.memory()) == (1, 123)
    monkeypatch.setattr(machine, "_cpu_quotas", lambda: [1e6])
    assert machine.cores() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_one_core_of_many_is_one_core():
    # Given a process that was given one core, as SLURM and taskset do, then it sees one.
    code = ("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
            "from zoo.machine import cores; print(cores())")
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert seen.stdout.strip() == "1"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux")
def test_freed_memory_is_kept_for_the_next_step():
    # Given blocks of 40 MB that are written and freed in turn, when freed memory is kept,
    code = ("import resource, sys, numpy as np; from zoo.machine import keep_freed_memory\n"
            "if sys.argv[1] == 'kept': keep_freed_memory()\n"
            "np.ones(10_000_000, 'f4'); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "for _ in range(20): np.ones(10_000_000, 'f4')\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")
    faults = {how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True)
                       .stdout) for how in ("kept", "returned")}
    # then the system hands out no page again.
    assert faults["kept"] * 10 < faults["returned"]
