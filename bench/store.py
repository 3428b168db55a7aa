"""How long it takes to read labels from the store, against a training step.

    python -m bench.store [--classes 1000] [--images 4000] [--batch 256] [--store FOLDER_OR_URL]

Fills a store with labels of random logits (one class stands out), reads it as the label path does, shard by shard, and prints milliseconds
for each batch. Process time is what the reading costs; wall time on a busy machine includes waiting for others.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np

from distill.crops import CropRecipe
from distill.soft_labels import encode
from student_trainer.store import SoftLabelStore, StoreIdentity

SHARD = 1000
MAX_TV = 0.02


def fill(store: SoftLabelStore, num_images: int, num_classes: int) -> None:
    random = np.random.default_rng(0)
    for shard in range(num_images // SHARD):
        logits_NK = random.normal(0, 2, (SHARD, num_classes)).astype(np.float32)
        logits_NK[np.arange(SHARD), random.integers(num_classes, size=SHARD)] += 12
        records = encode(logits_NK, (1.0,), MAX_TV)
        store.commit(0, shard, range(SHARD), [f"n{shard:08d}/image_{row:06d}.JPEG" for row in range(SHARD)], records, (1.0,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--store")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        identity = StoreIdentity(
            fingerprint="f" * 64, num_classes=words.classes, recipe=CropRecipe(image_size=8), seed=0, images=f"bench-{words.images}"
        )
        store = SoftLabelStore(words.store or folder, identity)
        if not store.segments:
            fill(store, words.images, words.classes)
        stats = store.stats()
        print(f"{stats.num_labels} labels of {words.classes} classes, {stats.size_bytes / stats.num_labels:.0f} B each on disk")
        for _ in range(3):
            wall, process = time.perf_counter(), time.process_time()
            count = sum(len(store.read(0, shard, 1.0, MAX_TV).rows) for shard in range(words.images // SHARD))
            batches = count / words.batch
            wall_ms, process_ms = 1e3 * (time.perf_counter() - wall) / batches, 1e3 * (time.process_time() - process) / batches
            print(f"reading: {wall_ms:.2f} ms a batch of {words.batch} (process time {process_ms:.2f} ms)")


if __name__ == "__main__":
    main()
