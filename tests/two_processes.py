"""Two ranks of one job on gloo, in which tests run one training after another.

They fork from a server that has imported everything, and stay: a training in them takes as long as it computes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch


def fork_server() -> Any:
    """A clean server process that has imported everything; each program forks from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "tests.crash_program", "tests.distributed_program", "tests.calibration_program", "tests.cache_program",
            "tests.recipe_program", "hf_compress.cli.recipe",
            "transformers.trainer",
            "hf_compress.training.joint_teacher", "hf_compress.training.proximal",
        ]
    )  # fmt: skip
    return context


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def become_rank(rank: int, port: int, processes: int = 2) -> None:
    """What a launcher tells the processes that it starts on one machine."""
    torch.set_num_threads(1)
    # A child of a fork server would start workers of data loaders in the same way, which import everything anew.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def _serve(rank: int, port: int, connection: Any) -> None:
    become_rank(rank, port)
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            # The test process has ended.
            os._exit(0)
        try:
            # As bytes: a tensor sent as such would need this process to live until it is read.
            connection.send((True, pickle.dumps(function(*args, **kwargs))))
        except Exception:
            connection.send((False, traceback.format_exc()))


class TwoProcesses:
    """Runs a function in both ranks at once, as often as wanted."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Any]] = []

    def _start(self) -> None:
        context, port = fork_server(), free_port()
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs))
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 120, **kwargs: Any) -> list[Any]:
        """What the function returns in rank 0 and in rank 1; the first error of either."""
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((function, args, kwargs))
        deadline, answers = time.monotonic() + seconds, {}
        while len(answers) < 2:
            for rank, (process, connection) in enumerate(self._ranks):
                if rank in answers or not connection.poll(0.005):
                    if rank not in answers and not process.is_alive():
                        answers[rank] = (False, f"ended with {process.exitcode}")
                    continue
                answers[rank] = connection.recv()
                if not answers[rank][0]:
                    # The other one may wait for it in vain.
                    deadline = min(deadline, time.monotonic() + 10)
            if time.monotonic() > deadline:
                break
        failed = [f"rank {rank}: {found}" for rank, (done, found) in sorted(answers.items()) if not done]
        if failed or len(answers) < 2:
            self.close()
            raise AssertionError("\n".join(failed) or f"not done after {seconds} s: only ranks {sorted(answers)}")
        return [pickle.loads(answers[rank][1]) for rank in range(2)]

    def close(self) -> None:
        """End both ranks."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join(30)
        self._ranks = []
