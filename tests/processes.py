"""Several processes that compute together, started within a moment: one that has imported everything is forked."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from contextlib import contextmanager

import torch

LIMIT = 250
"""Seconds after which processes that wait for one another are ended."""
IMPORTS = ["test_training_loop", "pipelines.finetune", "transformers.models.auto.modeling_auto"]


@contextmanager
def started(world_size, function, *arguments):
    """So many processes that torch.distributed can join, each with the pipe that brings what the function gives."""
    os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pairs = []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(rank, world_size, port, theirs, function, arguments))
        process.start()
        theirs.close()
        pairs.append((process, ours))
    deadline = time.monotonic() + LIMIT
    try:
        yield pairs
    finally:
        for process, _ in pairs:
            process.join(max(0, min(5, deadline - time.monotonic())))
            process.kill()


def together(world_size, function, *arguments):
    """What ``function(*arguments)`` gives in each of so many processes that torch.distributed can join."""
    deadline = time.monotonic() + LIMIT
    with started(world_size, function, *arguments) as pairs:
        results = [received(pipe, deadline) for _, pipe in pairs]
    if failed := [result for kind, result in results if kind == "failed"]:
        raise AssertionError("\n".join(failed))
    return [result for _, result in results]


def received(pipe, deadline):
    if not pipe.poll(max(0, deadline - time.monotonic())):
        return "failed", f"no answer in {LIMIT} seconds"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return "failed", "a process ended without an answer"


def _run(rank, world_size, port, pipe, function, arguments):
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "localhost"}
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own, for a loader's workers
    try:
        pipe.send_bytes(pickle.dumps(("done", function(*arguments))))  # a tensor as it is, not by a shared file
    except BaseException:
        pipe.send_bytes(pickle.dumps(("failed", f"process {rank}: {traceback.format_exc()}")))
        os._exit(1)  # without waiting for the others
