"""Where images come from: a folder, WebDataset shards or Parquet, by path or by URL, all read as the same records.

    open_source(path) -> Source -> read_shard(index) -> [ImageRecord(image_id, encoded bytes, label or None), ...]

Reading order: `records.py` (the vocabulary), `opening.py` (which kind a path is), then one file a kind; `labels.py` for labelled images.
"""

from distill.sources.labels import labelled_subset, listed_subset, read_ids, scan_labels
from distill.sources.opening import open_source
from distill.sources.records import ImageRecord, ShardInfo, Source

__all__ = ["ImageRecord", "ShardInfo", "Source", "labelled_subset", "listed_subset", "open_source", "read_ids", "scan_labels"]
