"""The errors hftl raises on purpose. Each carries every problem found, not only the first."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from hftl.redaction import sanitize

EXIT_PEER_LOST = 76
"""Exit status when another process of the run was lost: nothing is wrong with this one, starting again goes on."""

ROW_ADVICE = "Repair it, or leave such rows out with --data.on_error skip; 'hftl check' lists all of them before a run."
"""What to do about a row of `data.source` that cannot be used."""
RESUME_ADVICE = "Then run the same command with --resume auto."
"""How a run continues whose folder holds what it needs."""


class HftlError(Exception):
    """Base of all errors raised by hftl.

    Args:
        problems: One sentence per problem: what is wrong, where, which value, what is allowed, what to do.

    Attributes:
        exit_code: Status that a recipe or command ends with.
        agreed: Whether all processes raise the same one, so that it needs to be said once only.
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
    """A configuration value that cannot work."""

    agreed = True


class DataError(HftlError):
    """Data that cannot be read or does not fit the task."""


class RowError(DataError):
    """A row that cannot be read or used, found when it is fetched."""

    def with_advice(self, *sentences: str) -> RowError:
        """Returns the same problems, the last one followed by those of `sentences` that it does not contain yet."""
        *others, last = self.problems
        new = [sentence for sentence in sentences if sentence not in last]
        advised = RowError(*others, " ".join([last, *new]))
        advised.agreed = self.agreed
        return advised


@contextmanager
def row_advice(*sentences: str) -> Iterator[None]:
    """Adds to a `RowError` that leaves the block, or the decorated function, how to continue."""
    try:
        yield
    except RowError as error:
        raise error.with_advice(*sentences) from error


class ModelError(HftlError):
    """A model that cannot be found, built or loaded."""


class AdaptError(HftlError):
    """A way of adapting that does not fit the model."""


class ArtifactError(HftlError):
    """A saved model that cannot be opened, or does not compute what the trained one did."""


class PeerError(HftlError):
    """Another process of the run was lost, or did not answer in time."""

    exit_code = EXIT_PEER_LOST


class PushError(HftlError):
    """A model that did not reach the hub, or came back from there as another one."""

    agreed = True


class CheckpointError(HftlError):
    """A state of training that cannot be written, or that does not belong to this run."""

    agreed = True


class DiskError(HftlError):
    """A file of the run that cannot be written: the disk is full, read-only, over quota or broken."""

    agreed = True


class FeatureError(HftlError):
    """Features that cannot be computed, kept or used."""


class NonfiniteError(HftlError):
    """A loss or gradient that is NaN or infinite."""

    agreed = True


class Stopped(HftlError):
    """A training that was asked to stop, and has saved its state."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: the same command goes on from here."""
    agreed = True


class RunComplete(Exception):
    """Nothing is left to do: the run folder holds a finished run.

    Args:
        folder: The run folder.
        metrics: What `main` returned then.
    """

    def __init__(self, folder: str, metrics: dict[str, float | None]) -> None:
        self.folder = folder
        self.metrics = metrics
        super().__init__(f"the run in '{folder}' is complete")


def nearest(value: str, allowed: Iterable[str], count: int = 1) -> str:
    """Returns " Did you mean 'x'?" for the allowed names closest to `value`, or an empty string."""
    close = difflib.get_close_matches(value, list(allowed), n=count, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def shorten(names: Sequence[str], limit: int = 12) -> str:
    """Returns `names` joined by commas, cut after `limit` entries."""
    more = f", … ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def disk_error(error: BaseException, folder: object) -> DiskError | None:
    """Returns a disk's failure while `folder` was written, in our words; None where `error` is about something else.

    Libraries written in other languages pass on what the system said, but not its number.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
    reason = next((os.strerror(each) for each in numbers if os.strerror(each) in str(error)), None)
    if reason is None:
        return None
    file = getattr(error, "filename", None) or folder
    return DiskError(
        f"'{file}' cannot be written: {reason}. States of training that were saved are intact. Mend the disk and run "
        "the same command with --resume auto."
    )


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
