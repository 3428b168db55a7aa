"""The order of an epoch: complete, the same everywhere, cut among workers by position, cheap however many images there are."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.plan import EpochPlan, Rows

SIZES = (7, 1, 0, 12, 5, 3, 9, 4)  # uneven, one of them empty


def plan_of(
    global_batch: int = 6, seed: int = 3, epoch: int = 2, window_shards: int = 3, drop_last: bool = False, **more: bool
) -> EpochPlan:
    return EpochPlan(SIZES, seed, epoch, global_batch, window_shards, drop_last, **more)


def all_rows(plan: EpochPlan, start_step: int = 0) -> list[tuple[int, int]]:
    return [(int(shard), int(row)) for _, rows in plan.batches(start_step) for shard, row in rows]


def every_image() -> list[tuple[int, int]]:
    return [(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]


class TestCompleteness:
    @settings(max_examples=60)
    @given(
        sizes=st.lists(st.integers(0, 15), min_size=1, max_size=9),
        global_batch=st.integers(1, 20),
        window_shards=st.integers(1, 5),
        seed=st.integers(0, 2**63),
        epoch=st.integers(0, 1000),
        shuffle=st.booleans(),
    )
    def test_every_image_once(self, sizes: list[int], global_batch: int, window_shards: int, seed: int, epoch: int, shuffle: bool) -> None:
        plan = EpochPlan(tuple(sizes), seed, epoch, global_batch, window_shards, drop_last=False, shuffle=shuffle)
        batches = list(plan.batches())
        seen = [(int(shard), int(row)) for _, rows in batches for shard, row in rows]
        assert sorted(seen) == [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
        assert [step for step, _ in batches] == list(range(plan.num_steps))
        assert all(len(rows) == global_batch for _, rows in batches[:-1])
        assert plan.num_images == sum(sizes)

    @pytest.mark.parametrize("global_batch", [1, 6, 41, 42])
    def test_drop_last_leaves_out_only_the_rest(self, global_batch: int) -> None:
        kept, all_of_them = plan_of(global_batch, drop_last=True), plan_of(global_batch)
        seen = all_rows(kept)
        assert seen == all_rows(all_of_them)[: len(seen)]
        assert len(seen) == kept.num_steps * global_batch == 41 // global_batch * global_batch
        assert all(len(rows) == global_batch for _, rows in kept.batches())

    def test_dtype_and_shape(self) -> None:
        for _, rows in plan_of().batches():
            assert rows.dtype == np.int64
            assert rows.shape[1:] == (2,)


class TestOrder:
    def test_without_shuffle_it_is_the_sources_own(self) -> None:
        assert all_rows(plan_of(shuffle=False)) == every_image()

    def test_seed_and_epoch_change_it_and_nothing_else(self) -> None:
        orders = {tuple(all_rows(plan_of(seed=seed, epoch=epoch))) for seed, epoch in itertools.product(range(4), range(4))}
        assert len(orders) == 16
        assert tuple(every_image()) not in orders
        # The batch size cuts the same order.
        assert all_rows(plan_of(global_batch=5)) == all_rows(plan_of(global_batch=11))

    def test_images_of_different_shards_mix_within_a_window_only(self) -> None:
        plan = EpochPlan((50,) * 6, seed=0, epoch=0, global_batch=10, window_shards=2)
        order = all_rows(plan)
        for at, window in zip(range(0, 300, 100), plan.shard_order().reshape(3, 2).tolist(), strict=True):
            part = [shard for shard, _ in order[at : at + 100]]
            assert set(part) == set(window)
            # Two shards of 50 in random order change hands about 50 times; block after block would be once.
            assert sum(a != b for a, b in itertools.pairwise(part)) > 25

    def test_the_shuffle_is_even(self) -> None:
        """Where a given image lands, over many epochs: chi-squared of 10 bins below its 99.9 % quantile (27.9 at 9 degrees of freedom)."""
        landed = np.zeros(10)
        for epoch in range(400):
            order = all_rows(EpochPlan((10, 10), 0, epoch, 5))
            landed[order.index((1, 3)) // 2] += 1
        assert ((landed - 40) ** 2 / 40).sum() < 27.9

    def test_same_in_another_process(self) -> None:
        code = f"""
import hashlib
from distill.plan import EpochPlan
plan = EpochPlan({SIZES}, seed=3, epoch=2, global_batch=6, window_shards=3, drop_last=False)
print(hashlib.sha256(b"".join(rows.tobytes() for _, rows in plan.batches())).hexdigest())
"""
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        mine = hashlib.sha256(b"".join(rows.tobytes() for _, rows in plan_of().batches())).hexdigest()
        assert other.stdout.strip() == mine


class TestWorkers:
    @pytest.mark.parametrize("world", [2, 3, 4, 7])
    @pytest.mark.parametrize("drop_last", [False, True])
    def test_workers_share_each_batch_by_position(self, world: int, drop_last: bool) -> None:
        plan = plan_of(drop_last=drop_last)
        whole = list(plan.batches())
        parts = [list(plan.batches(rank=rank, world=world)) for rank in range(world)]
        assert all(len(part) == len(whole) for part in parts), "a worker without a step would hang the others"
        for index, (step, rows) in enumerate(whole):
            again: Rows = np.full_like(rows, -1)
            for rank in range(world):
                assert parts[rank][index][0] == step
                again[rank::world] = parts[rank][index][1]
            np.testing.assert_array_equal(again, rows)


class TestResume:
    @pytest.mark.parametrize("drop_last", [False, True])
    @pytest.mark.parametrize("world", [1, 3])
    def test_start_step_skips_exactly_so_many(self, drop_last: bool, world: int) -> None:
        plan = plan_of(drop_last=drop_last)
        whole = list(plan.batches(rank=world - 1, world=world))
        for start in range(plan.num_steps + 1):
            rest = list(plan.batches(start_step=start, rank=world - 1, world=world))
            assert [step for step, _ in rest] == [step for step, _ in whole[start:]]
            for (_, found), (_, expected) in zip(rest, whole[start:], strict=True):
                np.testing.assert_array_equal(found, expected)


class TestScale:
    def test_a_million_images_cost_one_window(self) -> None:
        """The full list would be 16 MB; one window of 4 shards is 64 kB. Limits are loose, for slow machines."""
        tracemalloc.start()
        started = time.perf_counter()
        plan = EpochPlan((1000,) * 1000, seed=0, epoch=0, global_batch=256)
        first = next(plan.batches())[1]
        far = next(plan.batches(start_step=3000))[1]
        seconds, (_, peak_bytes) = time.perf_counter() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert first.shape == far.shape == (256, 2)
        assert plan.num_steps == 3906
        assert peak_bytes < 1_500_000
        assert seconds < 2
