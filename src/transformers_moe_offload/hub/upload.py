"""Upload a folder with a checkpoint to the Hub so that no commit in between can be loaded, and again after a failure.

What is in the folder is its writer's business, see `Layout`; whether it is whole has been checked before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.tensor_files.writer import PARTIAL

T = TypeVar("T")
logger = logging.getLogger(__name__)

_WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts while the Hub is in trouble; huggingface_hub (2.4) repeats uploads of files by itself, but
not requests that create or commit something."""

_ADVICE = {
    401: "log in with `hf auth login`, or pass a token",
    403: "does the token allow to write there, and is there storage left?",
    404: "is it spelt right, and does the token see it?",
    409: "somebody else is writing to it; run it again",
}


_ConnectionFailed: Any = HfHubHTTPError.__bases__[0]
"""What the HTTP client of huggingface_hub raises; which client that is depends on the version."""

_Failures: Any = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, _ConnectionFailed, OSError, RuntimeError)


class UploadError(MoeOffloadError):
    """A checkpoint that could not be uploaded, with the reason; the folder is as it was."""


@dataclass(frozen=True)
class Layout:
    """What an uploader has to know of a folder."""

    last: str
    """The file without which nothing of it can be loaded: it is removed first, and comes last."""
    replaced: tuple[str, ...]
    """Patterns of files that belong to such a checkpoint alone: those on the Hub that are not in the folder go."""
    message: str
    """Of the commit."""


def upload(
    api: HfApi,
    folder: Path,
    repo: str,
    layout: Layout,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Create the repository where it is missing, and upload the folder; returns its address, or the pull request's.

    The Hub may take a large folder in several commits. After an interruption it can be run again: what the Hub has is
    not sent twice. Raises `UploadError` for what the Hub refuses.
    """
    if create_pr and revision not in (None, "main"):
        raise UploadError(
            f"a pull request is made against main, but revision is {revision!r}; leave create_pr or revision out"
        )

    def attempt(call: Callable[[], T]) -> T:
        return _patiently(call, folder, repo)

    repo_id = attempt(lambda: api.create_repo(repo, private=private, exist_ok=True)).repo_id
    if revision is not None:
        attempt(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    commit = attempt(
        lambda: api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=layout.message,
            ignore_patterns=[f"*{PARTIAL}", layout.last],
            delete_patterns=[layout.last, *layout.replaced],
        )
    )
    place = commit.pr_revision if create_pr else revision
    last = attempt(
        lambda: api.upload_file(
            repo_id=repo_id,
            path_or_fileobj=folder / layout.last,
            path_in_repo=layout.last,
            revision=place,
            commit_message=f"{layout.message}: {layout.last}",
        )
    )
    return str(commit.pr_url if create_pr else last.repo_url)


def expect_pushable(api: HfApi, repo: str) -> None:
    """Raise `UploadError` for a repository that cannot be, or a token that the Hub does not know; before the work."""
    try:
        api.repo_exists(repo)
        api.whoami()
    except _Failures as error:
        raise UploadError(f"cannot upload to {repo!r}: {_one_line(error)}") from error


def _patiently(call: Callable[[], T], folder: Path, repo: str) -> T:
    """What a request to the Hub gives, repeated while it is the Hub that fails."""
    for wait in (*_WAITS, None):
        try:
            return call()
        except _Failures as error:
            status = _status(error)
            may_pass = isinstance(error, _ConnectionFailed) if status is None else _passes(status)
            if wait is None or not may_pass:
                raise UploadError(
                    f"cannot upload {folder} to {repo!r}: {_one_line(error)}; {_advice(status)}. The folder is as it "
                    f"was, and what the Hub has already is not sent again"
                ) from error
            logger.warning("The Hub answers %s; trying again in %g s.", status or _one_line(error), wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _passes(status: int | None) -> bool:
    """Whether it is trouble that may pass."""
    return status is not None and (status == 429 or status >= 500)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error is about; huggingface_hub wraps those of single files."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _advice(status: int | None) -> str:
    if _passes(status):
        return f"the Hub is in trouble, and was so {len(_WAITS) + 1} times in a row; run it again later"
    return _ADVICE.get(status or 0, "see what it says, and run it again")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
