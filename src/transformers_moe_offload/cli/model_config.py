"""Read the config of the named MODEL first: if there is no such model, the error is early and plain.

A misspelt folder is not looked up on the Hub, and the command waits for an unreachable Hub only once, not again for
tokenizer and weights.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and not in its __all__
from transformers import AutoConfig, PretrainedConfig

from transformers_moe_offload.cli.failures import CommandError, reading
from transformers_moe_offload.cli.options import Origin

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"


def read_config(name: str, origin: Origin, what: str) -> PretrainedConfig:
    """The config of a model in a folder or on the Hub; `what` begins the error where there is none."""
    folder = Path(name)
    if folder.is_dir() and not (folder / _CONFIG).is_file():
        is_adapter = (folder / _ADAPTER).is_file()
        hint = f"it holds an adapter ({_ADAPTER}); name the model that the adapter is for" if is_adapter else ""
        raise CommandError(f"{what}: the folder has no {_CONFIG}; {hint or 'name one that a model was saved to'}")
    if folder.is_file():
        raise CommandError(f"{what}: it is a file; name the folder that a model was saved to, or an id of the Hub")
    if not folder.exists():
        _expect_id(name, what)
        what = f"there is no folder {name!r} here, and no model of that name can be read from the Hub"
    with reading(what):
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(name, **origin.for_classes())
        except (OSError, ValueError, ImportError):
            raise
        except Exception as error:  # classes of configs raise various errors for values that they do not expect
            raise CommandError(f"{what}: its config is not valid: {error}") from error
        return config


def _expect_id(name: str, what: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CommandError(
            f"{what}: there is no such folder, and it is not a valid Hub id, such as 'org/model'"
        ) from error
