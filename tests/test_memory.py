"""Memory stays flat however often a pruner is put on a model, used and taken off."""

import gc
import os
from pathlib import Path

import pytest
import torch
from test_engine import seeded, tiny_llama
from test_router_training import SCHEDULE

from ftp_lightning import DynamicRouter, TokenPruner


def resident() -> int:
    """Bytes of this process that lie in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["keep", "evict"])
def test_memory_is_flat_over_500_times_attached_used_and_detached(kv):
    model = tiny_llama(torch.float32)

    def use(times: int) -> int:
        for number in range(times):
            pruner = TokenPruner(seeded(DynamicRouter), SCHEDULE, kv=kv)
            pruner.attach(model)
            ids = torch.arange(1, 24 + number % 5).remainder(model.config.vocab_size)[None]
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
            pruner.detach()
        return resident()

    before = use(100)
    assert use(500) < 1.02 * before
