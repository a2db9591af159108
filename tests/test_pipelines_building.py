"""Settings become parts."""

import numpy as np
from accelerate import Accelerator

from pipelines.building import build_batching
from pipelines.config import load
from training.batches import micro_batches


def test_a_pass_on_a_cpu_is_of_2048_tokens_at_most():
    """So that memory does not grow with the batch; the update is the same."""
    batching = build_batching(load("configs/qa.yaml"), Accelerator(cpu=True))
    parts = micro_batches(np.arange(32), np.full(32, 256), batching)
    assert [len(part) for part in parts] == [8, 8, 8, 8]
