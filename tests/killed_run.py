"""A run that kills itself with SIGKILL at an exact point.

The point is update:N (after update N), file:N:NAME (in the save of step N, after NAME is written), shards:N (in the
save of step N, after the parts of a sharded model are written), rename:N (the save of step N is whole, the prune has
not begun), or never. On several ranks every rank dies, as when a machine does.
"""

import os
import signal
import sys

from training import checkpoints, loop


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point):
    kind, *where = point.split(":")
    if kind == "update":
        plain_update = loop.run_update

        def update(*args, step, **kwargs):
            done = plain_update(*args, step=step, **kwargs)
            return die() if step + 1 == int(where[0]) else done

        loop.run_update = update
    elif kind == "file":
        plain_save_file = checkpoints.save_file

        def save_file(tensors, path):
            plain_save_file(tensors, path)
            if path.name == where[1] and path.parent.name == f".tmp-step-{where[0]}":
                with path.open("r+b") as file:  # torn, as by a kernel that had not written it out
                    file.truncate(path.stat().st_size // 2)
                die()

        checkpoints.save_file = save_file
    elif kind == "shards":
        plain_write_shards = checkpoints.write_shards

        def write_shards(tensors, folder):
            done = plain_write_shards(tensors, folder)
            return die() if folder.name == f".tmp-step-{where[0]}-shards" else done

        checkpoints.write_shards = write_shards
    elif kind == "rename":
        plain_prune = checkpoints.prune

        def prune(folder, **kwargs):
            return die() if (folder / f"step-{where[0]}").exists() else plain_prune(folder, **kwargs)

        checkpoints.prune = prune


def finetune_and_die(log, point, config, overrides):
    """What is said is left in ``log``."""
    from pipelines.config import load
    from pipelines.finetune import finetune

    with open(log, "a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    arm(point)
    finetune(load(config, overrides))
