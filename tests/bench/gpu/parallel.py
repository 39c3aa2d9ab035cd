"""Data-parallel training: a step of one rank, of two, and the same adapter either way; over NCCL, on a CPU over ring.

Each rank is a process of its own with one card, as `mlx.launch` starts it (`parallel_rank.py`); a peer's likewise.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu import parent

HERE = Path(__file__).parent
START = "import sys; sys.path.insert(0, sys.argv[1]); from bench.gpu import {module}; {module}.main()"
LIMIT = 600  # seconds until a rank that hangs fails the case


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the setting `measure` asks for -> the figures of one case; none where there are too few cards."""
    if lacking := too_few(settings):
        return lacking
    with tempfile.TemporaryDirectory() as folder:
        return {"speed": speed, "same": same, "killed": killed}[settings["measure"]](settings, Path(folder))


def too_few(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is said instead of figures where ranks would have to share a card; numbers come out the same then, too."""
    if settings.get("tiny") or settings.get("measure", "speed") != "speed":
        return None
    ranks = settings["ranks"]
    return None if cards() >= ranks else {"how": f"not run: takes {ranks} cards, and there are {cards()}"}


def cards() -> int:
    """NVIDIA cards of this machine."""
    lister = shutil.which("nvidia-smi")
    listed = subprocess.run([lister, "-L"], capture_output=True, text=True, check=False).stdout if lister else ""
    return len(listed.splitlines())


def speed(settings: Mapping[str, Any], folder: Path, module: str = "parallel_rank") -> dict[str, Any]:
    """Steps of one rank, then of several; `ratio` is one over the other, 1 where ranks cost nothing."""
    ranks = settings["ranks"]
    each = [together(module, settings, 1, folder, card)[0]["seconds"] for card in range(ranks)]
    alone = each[0]
    found = together(module, settings, ranks, folder)
    seconds = max(one["seconds"] for one in found)
    # The least of them: in the others' there is waiting for the slowest rank as well. Torch does not tell it apart.
    reduced = min((one["reduce_seconds"] / seconds for one in found if "reduce_seconds" in one), default=None)
    share = "" if reduced is None else f", {100 * reduced:.2g} % of it the reduction"
    said = ", ".join(f"{value:.3g}" for value in each)
    return {
        "how": f"{ranks} ranks{share}; one rank {said} s; {ranks / seconds:.3g} items a second",
        "ranks": ranks,
        "seconds": seconds,
        "alone_seconds": alone,
        "alone_by_card": each,
        "ratio": round(seconds / alone, 4),
        "items_per_second": round(ranks / seconds, 3),
        "alone_items_per_second": round(1 / alone, 3),
        "reduce_share": reduced,
        "peak_gib": max(one["peak_gib"] for one in found),
        "by_rank": found,
    }


def same(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """How far the adapters of several ranks, and of one that accumulates, are apart after the same steps."""
    import mlx.core as mx

    ranks, adapters = settings["ranks"], []
    for count, passes in ((ranks, 1), (1, ranks)):
        together("parallel_rank", {**settings, "accumulate": passes}, count, folder)
        adapters.append(mx.load(str(folder / "adapter.safetensors")))
    one, other = adapters
    apart = sum(float(mx.sum((one[name] - other[name]) ** 2)) for name in one) ** 0.5
    moved = sum(float(mx.sum(other[name] ** 2)) for name in other if "lora_B" in name) ** 0.5
    where = f"{ranks} ranks{' on one card' if 0 < cards() < ranks else ''}"
    return {"how": f"{where} against accumulate {ranks}", "apart": apart, "ratio": round(apart / moved, 6)}


def killed(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds from the sudden end of rank 1 to that of rank 0, which is told to leave as `mlx.launch` would."""
    processes = start("parallel_rank", {**settings, "steps": 10**6, "beat": True}, 2, folder)
    try:
        while not (folder / "beat").exists():
            if processes[0].poll() is not None:
                raise RuntimeError(f"rank 0 ended by itself: {processes[0].communicate()[1][-600:]}")
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        processes[0].send_signal(signal.SIGTERM)
        processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
    return {
        "how": f"rank 0 ended with status {processes[0].returncode}",
        "status": processes[0].returncode,
        "seconds": round(time.monotonic() - began, 2),
    }


def together(module: str, settings: Mapping[str, Any], ranks: int, folder: Path, card: int = 0) -> list[dict[str, Any]]:
    """What each of so many ranks found; the first has this card."""
    processes = start(module, settings, ranks, folder, card)
    try:
        said = [process.communicate(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank ended with status {process.returncode}: {error[-800:]}")
    return [json.loads(printed.strip().splitlines()[-1]) for printed, _ in said]


def start(
    module: str, settings: Mapping[str, Any], ranks: int, folder: Path, card: int = 0
) -> list[subprocess.Popen[str]]:
    """The processes of so many ranks; the first has this card."""
    command = [sys.executable, "-W", "ignore", "-c", START.format(module=module), str(HERE.parents[1])]
    command += [json.dumps(dict(settings)), str(folder)]
    return [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parents[2]
        )
        for environment in environments(ranks, settings.get("tiny", False), folder, card)
    ]


def environments(ranks: int, is_tiny: bool, folder: Path, card: int = 0) -> list[dict[str, str]]:
    """The variables that a launcher would set for each rank, for MLX and for torch."""
    first = free_ports(ranks)
    hosts = folder / f"hosts-{first}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(ranks)]))
    torch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(first), "WORLD_SIZE": str(ranks)}
    if ranks == 1:
        ours: dict[str, str] = {}
    elif is_tiny:
        ours = {"MLX_HOSTFILE": str(hosts)}
    else:
        ours = {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(first), "MLX_WORLD_SIZE": str(ranks)}
    common = {**os.environ, **parent.named(), **torch, **ours}
    found = cards()
    own = [
        {"MLX_RANK": str(rank), "RANK": str(rank), "CUDA_VISIBLE_DEVICES": str((card + rank) % max(1, found))}
        for rank in range(ranks)
    ]
    if found < ranks:  # NCCL refuses two ranks on one card, unless it takes them for two machines
        own = [{**of_rank, "NCCL_HOSTID": f"rank-{rank}"} for rank, of_rank in enumerate(own)]
        common |= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    return [{**common, **of_rank} for of_rank in own]


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as tried:
            first = tried.getsockname()[1]
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first
