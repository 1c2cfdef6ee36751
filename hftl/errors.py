"""Exceptions of hftl. Each carries all problems of a check, not only the first."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from hftl.redaction import sanitize

EXIT_PEER_LOST = 76
"""Exit status after the failure of another process; the same command with `--resume auto` resumes."""

ROW_ADVICE = "Fix it, or skip invalid rows with --data.on_error skip; 'hftl check' lists all of them."
"""Instruction for an invalid row of `data.source`."""
RESUME_ADVICE = "Then run the same command with --resume auto."
"""Instruction for a run folder with a checkpoint."""


class HftlError(Exception):
    """Base of all errors raised by hftl.

    Args:
        problems: One message per problem: setting or file, fact with value, allowed values, instruction.

    Attributes:
        exit_code: Exit status of the recipe or command.
        agreed: Whether all processes raise the same error, so that only the main process prints it.
    """

    exit_code = 2
    agreed = False

    def __init__(self, *problems: str) -> None:
        self.problems = list(dict.fromkeys(map(sanitize, problems)))
        super().__init__(self._message())

    def _message(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in self.problems)


class ConfigError(HftlError):
    """Invalid configuration value."""

    agreed = True


class DataError(HftlError):
    """Unreadable data, or data that does not fit the task."""


class RowError(DataError):
    """Invalid row, detected when it is fetched."""

    def with_advice(self, *instructions: str) -> RowError:
        """Returns the same problems with `instructions` appended to the last one, without repetition."""
        *first, last = self.problems
        missing = [instruction for instruction in instructions if instruction not in last]
        advised = RowError(*first, " ".join([last, *missing]))
        advised.agreed = self.agreed
        return advised


@contextmanager
def row_advice(*instructions: str) -> Iterator[None]:
    """Appends instructions to a `RowError` raised in the block or the decorated function."""
    try:
        yield
    except RowError as error:
        raise error.with_advice(*instructions) from error


class ModelError(HftlError):
    """Model that cannot be found, built or loaded."""


class AdaptError(HftlError):
    """Adaptation method that does not fit the model."""


class ArtifactError(HftlError):
    """Saved model that cannot be loaded, or whose logits differ from those of the trained model."""


class PeerError(HftlError):
    """Failure of another process of the run, or no response before the timeout."""

    exit_code = EXIT_PEER_LOST


class PushError(HftlError):
    """Failed upload to the Hub, or an uploaded model that differs from the saved one."""

    agreed = True


class CheckpointError(HftlError):
    """Checkpoint that cannot be written, or that belongs to another run."""

    agreed = True


class DiskError(HftlError):
    """Failed write to a file of the run: the disk is full, read-only, over quota or defective."""

    agreed = True


class FeatureError(HftlError):
    """Features that cannot be computed, cached or used."""


class NonfiniteError(HftlError):
    """Loss or gradient that is NaN or infinite."""

    agreed = True


class Stopped(HftlError):
    """Run that ended after a stop signal, with a saved checkpoint."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: the same command with `--resume auto` resumes."""
    agreed = True


class RunComplete(Exception):
    """Finished run in the run folder; nothing is left to do.

    Args:
        folder: The run folder.
        metrics: The metrics that the run returned.
    """

    def __init__(self, folder: str, metrics: dict[str, float | None]) -> None:
        self.folder = folder
        self.metrics = metrics
        super().__init__(f"the run in '{folder}' is complete")


def nearest(value: str, allowed: Iterable[str], count: int = 1) -> str:
    """Returns " Did you mean 'x'?" with the `count` allowed names closest to `value`, or an empty string."""
    close = difflib.get_close_matches(value, list(allowed), n=count, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def shorten(names: Sequence[str], limit: int = 12) -> str:
    """Returns `names` joined by commas, truncated after `limit` entries."""
    rest = f", … ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def disk_error(error: BaseException, folder: object) -> DiskError | None:
    """Returns the `DiskError` for a disk failure while writing to `folder`, or None if `error` has another cause.

    The message is searched because libraries in other languages pass on the system's message without its errno.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
    reason = next((os.strerror(number) for number in numbers if os.strerror(number) in str(error)), None)
    if reason is None:
        return None
    file = getattr(error, "filename", None) or folder
    return DiskError(
        f"'{file}' cannot be written: {reason}. Saved checkpoints are intact. Fix the disk and run the same command "
        "with --resume auto."
    )


def first_line(error: BaseException) -> str:
    """Returns the first line of the error message, or the name of its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
