"""Rows written once to the cache of `datasets` as Arrow, by whichever process comes first, and mapped by all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import pyarrow as pa
from datasets import ArrowBasedBuilder, BuilderConfig, Dataset, DatasetInfo, SplitGenerator, VerificationMode
from datasets.fingerprint import Hasher

try:
    from datasets.builder import Key
except ImportError:  # datasets 4.0 has plain keys
    Key = None


class Written(ArrowBasedBuilder):
    """Rows under a key: equal keys are equal rows. A lock of `datasets` lets one process write and others wait.

    Args:
        key: What the rows depend on, hashable by `datasets`.
        split: Their split.
        cache_dir: In place of the cache of `datasets`.
    """

    batches: Callable[[], Iterable[pa.Table]]
    """Makes the rows where they are not there yet; in the types of `info.features`."""

    def __init__(self, key: Any, split: str, cache_dir: str | None = None) -> None:
        self.split = split
        super().__init__(cache_dir, "hftl", hash=Hasher.hash(key), config_name="rows", config_id="rows")

    def _create_builder_config(self, *_: Any, **__: Any) -> tuple[BuilderConfig, str]:
        return BuilderConfig("rows"), "rows"

    def rows(self) -> Dataset:
        """Returns the rows."""
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


def is_written(maker: Written) -> bool:
    """Whether the rows are in the cache already."""
    return os.path.exists(os.path.join(maker.cache_dir, "dataset_info.json"))
