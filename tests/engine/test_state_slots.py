"""State slots of hybrids: one per running request, given back with its blocks, begun with zeros."""

from __future__ import annotations

import random
from pathlib import Path

from nvfp4_runtime.cache.block_pool import BlockPool
from nvfp4_runtime.config import CacheConfig, EngineConfig, SchedulerConfig
from nvfp4_runtime.engine.build import build_engine
from nvfp4_runtime.engine.request import Request
from nvfp4_runtime.engine.scheduler import Scheduler, StepResult
from tests import tiny
from tests.engine.helpers import run_to_end, submit, tokens_of


def test_no_slot_is_lost_or_shared_over_random_workloads() -> None:
    preempted = 0
    for seed in range(60):
        draw = random.Random(seed)
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64)
        scheduler = Scheduler(config, BlockPool(10), 8, enable_prefix_caching=False, num_state_slots=4)
        for i in range(12):
            prompt = [draw.randrange(200) for _ in range(draw.randint(1, 30))]
            scheduler.add(Request(submit(f"r{i}", prompt, draw.randint(1, 20)), i, (), 64))
        while scheduler.has_work:
            schedule = scheduler.schedule()
            slots = [entry.request.state_slot for entry in schedule.entries]
            assert len(set(slots)) == len(slots)
            assert all(1 <= slot <= 4 for slot in slots)
            for entry in schedule.entries:
                scheduler.commit(entry, StepResult(7 if entry.samples else None), 0.0)
            if draw.random() < 0.1 and scheduler.requests:
                scheduler.abort(draw.choice(sorted(scheduler.requests)))
            scheduler.check()
        preempted += scheduler.num_preemptions
    assert preempted > 10


def test_a_slot_that_was_used_begins_with_zeros(tmp_path: Path) -> None:
    """The same prompt again and again over two slots, in changing company: one answer."""
    config = tiny.nemotron_h_config()
    folder = tiny.write_plain(tmp_path, config, tiny.random_tensors(config, seed=4))
    options = EngineConfig(
        model=str(folder), dtype="float32", cache=CacheConfig(num_blocks=65), scheduler=SchedulerConfig(max_num_seqs=2)
    )
    engine = build_engine(options)
    assert not engine.info.enable_prefix_caching
    for i in range(6):
        engine.add(submit(f"same{i}", [5, 6, 7, 8, 9], 6))
        engine.add(submit(f"other{i}", list(range(10 + i, 40 + i)), 3 + i))
    outputs = run_to_end(engine)
    assert len({tuple(tokens_of(outputs[f"same{i}"])) for i in range(6)}) == 1
    assert len({tuple(tokens_of(outputs[f"other{i}"])) for i in range(6)}) > 1
