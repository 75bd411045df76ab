"""How many processors this process may use."""

import math
import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # of a container: "<microseconds> <period>", or "max <period>"


def usable_cores() -> int:
    """The processors of the machine, less what affinity or a container's limit takes away; OMP_NUM_THREADS decides where it is set."""
    if (asked := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(asked):
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = CPU_MAX.read_text(encoding="ascii").split() if CPU_MAX.is_file() else ["max"]
    return max(1, min(cores, math.ceil(int(quota[0]) / int(quota[1])))) if quota[0] != "max" else cores
