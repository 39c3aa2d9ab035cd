"""Training steps as CUDA graphs, since small models are bound by launching kernels; and how long to go on."""

import gc
import math
import time
from collections.abc import Callable, Iterator

import torch

WARM_UP = 3


def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` run a few times, then recorded, so that calling the result replays it; as it is where that cannot be.

    A step reads and writes fixed tensors and makes the host wait for nothing.
    """
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        print(f"not recorded: {error}", flush=True)
        return step
    return graph.replay


def progress(steps: int, limit: float) -> Iterator[float]:
    """Shares of the work that is done, from 0 up to 1: `steps` of it, or `limit` seconds if that is less."""
    started, step, done = time.perf_counter(), 0, 0.0
    while done < 1:
        yield done
        step += 1
        if step % 8 == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()  # so that the clock is about steps that are done
        done = max(step / steps, (time.perf_counter() - started) / limit)


def rate(peak: float, step: int, warm_up: int, done: float) -> float:
    """The learning rate: up in `warm_up` steps, down along a cosine to a hundredth."""
    return peak * min(1.0, (step + 1) / warm_up) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * done))
