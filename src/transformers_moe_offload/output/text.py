"""Small files as Transformers writes them."""

from __future__ import annotations

import json
from typing import Any


def as_json(content: Any) -> str:
    """JSON as `save_pretrained` writes it."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
