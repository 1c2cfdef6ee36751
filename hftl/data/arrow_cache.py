"""Arrow cache of `datasets`: the first process writes the rows, all processes memory-map them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import pyarrow as pa
from datasets import ArrowBasedBuilder, BuilderConfig, Dataset, DatasetInfo, SplitGenerator, VerificationMode
from datasets.fingerprint import Hasher

try:
    from datasets.builder import Key
except ImportError:  # datasets 4.0 uses integer keys
    Key = None


class CachedRows(ArrowBasedBuilder):
    """Dataset builder with a content key: equal keys return equal rows.

    A file lock of `datasets` lets one process write while the others wait.

    Args:
        key: Cache key, hashable by `datasets`; covers everything that the rows depend on.
        split: Split name.
        cache_dir: Cache folder; default: the cache of `datasets`.
    """

    batches: Callable[[], Iterable[pa.Table]]
    """Generates the rows on a cache miss, with the types of `info.features`."""

    def __init__(self, key: Any, split: str, cache_dir: str | None = None) -> None:
        self.split = split
        super().__init__(cache_dir, "hftl", hash=Hasher.hash(key), config_name="rows", config_id="rows")

    def _create_builder_config(self, *_: Any, **__: Any) -> tuple[BuilderConfig, str]:
        return BuilderConfig("rows"), "rows"

    def rows(self) -> Dataset:
        """Returns the memory-mapped rows; writes them on a cache miss."""
        self.download_and_prepare(verification_mode=VerificationMode.NO_CHECKS)
        return cast("Dataset", self.as_dataset(str(self.split)))

    def _info(self) -> DatasetInfo:
        return DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator(self.split)]

    def _generate_shards(self, **_: Any) -> Iterator[str]:
        yield self.split

    def _generate_tables(self, **_: Any) -> Iterator[tuple[Any, pa.Table]]:
        for number, table in enumerate(self.batches()):
            yield Key(0, number) if Key else number, table


def is_cached(builder: CachedRows) -> bool:
    """Whether the cache contains the rows of `builder`."""
    return os.path.exists(os.path.join(builder.cache_dir, "dataset_info.json"))
