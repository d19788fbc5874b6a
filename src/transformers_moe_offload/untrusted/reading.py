"""Errors that other libraries raise for a bad name, file or setting become one of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers_moe_offload.errors import CheckpointError, MoeOffloadError


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn every error of the block into a `CheckpointError` whose message `what` begins; ours stay as they are.

    This covers every exception, because a config that no model can be built from may raise anything.
    """
    try:
        yield
    except MoeOffloadError:
        raise
    except OSError as error:
        raise CheckpointError(f"{what}: {system_words(error, what)}") from error
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"{what}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error


def system_words(error: OSError, before: str) -> str:
    """The system's message, with the file's name unless `before` contains it; unchanged without `strerror`."""
    if error.strerror is None:
        return str(error)
    is_named = error.filename is None or str(error.filename) in before
    return error.strerror if is_named else f"{error.strerror}: {error.filename}"
