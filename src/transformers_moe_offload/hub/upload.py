"""Upload a checkpoint folder to the Hub: no intermediate commit can be loaded, and a failed upload can be repeated.

The code that wrote the folder describes it (`Layout`); the caller has checked that it is complete.
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
from transformers_moe_offload.hub.fetch import CONNECTION_FAILED
from transformers_moe_offload.tensor_files.writer import PARTIAL
from transformers_moe_offload.untrusted import one_line

T = TypeVar("T")
logger = logging.getLogger(__name__)

_WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts while the Hub fails. huggingface_hub (2.4) retries uploads of files itself, but not requests
that create a repository or a commit."""

_ADVICE = {
    401: "log in with `hf auth login`, or pass a token",
    403: "does the token allow to write there, and is there storage left?",
    404: "is it spelt right, and does the token see it?",
    409: "another commit is being written to it; run it again",
}

_Failures: Any = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, CONNECTION_FAILED, OSError, RuntimeError)


class UploadError(MoeOffloadError):
    """A checkpoint could not be uploaded; the message says why. The folder is unchanged."""


@dataclass(frozen=True)
class Layout:
    """What the upload needs to know about a folder."""

    last: str
    """The file without which the checkpoint cannot be loaded: removed first and uploaded last."""
    replaced: tuple[str, ...]
    """Patterns of files that only such a checkpoint has: those on the Hub that are not in the folder are deleted."""
    message: str
    """Message of the commit."""


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
    """Create the repository if it is missing, and upload the folder; returns its URL, or the pull request's.

    A large folder may take several commits. An interrupted upload can be run again: files that the Hub already has are
    not sent twice. Raises `UploadError` if the Hub refuses a request.
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
    """Raise `UploadError` for an invalid repository name or a token that the Hub rejects; called before the work."""
    try:
        api.repo_exists(repo)
        api.whoami()
    except _Failures as error:
        raise UploadError(f"cannot upload to {repo!r}: {_said(error)}") from error


def _patiently(call: Callable[[], T], folder: Path, repo: str) -> T:
    """The result of a request to the Hub, retried while the connection or the Hub itself fails."""
    for wait in (*_WAITS, None):
        try:
            return call()
        except _Failures as error:
            status = _status(error)
            may_pass = isinstance(error, CONNECTION_FAILED) if status is None else _passes(status)
            if wait is None or not may_pass:
                raise UploadError(
                    f"cannot upload {folder} to {repo!r}: {_said(error)}; {_advice(status)}. The folder is as it "
                    f"was, and what the Hub has already is not sent again"
                ) from error
            logger.warning("The Hub answers %s; trying again in %g s.", status or _said(error), wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _passes(status: int | None) -> bool:
    """Whether the error is temporary: too many requests, or a failure of the server."""
    return status is not None and (status == 429 or status >= 500)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error or its causes, or None; huggingface_hub wraps errors of single files in others."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def _advice(status: int | None) -> str:
    if _passes(status):
        return f"the Hub failed {len(_WAITS) + 1} times in a row; run it again later"
    return _ADVICE.get(status or 0, "see what it says, and run it again")


def _said(error: BaseException) -> str:
    return one_line(error, 1000)  # long enough for the advice that ends the Hub's messages
