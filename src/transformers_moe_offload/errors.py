"""What can go wrong, as one small tree.

    MoeOffloadError
    ├── ConfigError            an option that is invalid, or not supported yet
    │   └── PageLockError      the system does not grant the page-locked memory that an option needs
    ├── CapacityError          a budget too small to run the model at all
    ├── CheckpointError        files that are missing, short, replaced, changed, or not what they say
    ├── UnsupportedModelError  a model without routed experts, or with experts we cannot offload
    ├── UpstreamError          a version of another library that lacks a part that we need
    └── RecipeError            a mixture of experts that cannot be built

Every message names what was wrong, the two things that disagree, and what to change.
"""

from __future__ import annotations


class MoeOffloadError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(MoeOffloadError, ValueError):
    """An option of `OffloadConfig` that cannot be honoured. Also a `ValueError`, as callers of Transformers expect."""


class PageLockError(ConfigError):
    """Page-locked memory that the system does not grant."""


class CapacityError(MoeOffloadError):
    """A cache budget with which the model cannot run.

    `smallest_budget` is the smallest `OffloadConfig.cache_budget`, in bytes, that works.
    """

    def __init__(self, message: str, *, smallest_budget: int) -> None:
        super().__init__(message)
        self.smallest_budget = smallest_budget


class CheckpointError(MoeOffloadError):
    """Checkpoint files that are missing, truncated, replaced or changed since the model was loaded, or inconsistent."""


class UnsupportedModelError(MoeOffloadError):
    """A model whose experts cannot be offloaded, with the reason."""


class UpstreamError(MoeOffloadError, ImportError):
    """A version of Transformers or another library that lacks what this package needs. Also an `ImportError`."""


class RecipeError(MoeOffloadError, ValueError):
    """A recipe for a mixture of experts that cannot be built, with the reason. Also a `ValueError`."""
