"""`moe-offload chat`: talk to a model whose experts are offloaded, and watch its cache."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_offload_cli import options


def chat(
    context: typer.Context,
    model: options.Model,
    cache_budget: options.CacheBudget = "auto",
    policy: options.Policy = "lru",
    arithmetic: options.Arithmetic = "fast",
    experts: options.Experts = None,
    layers: options.Layers = None,
    hot: options.Hot = None,
    trace: options.HotTrace = None,
    hot_share: options.HotShare = None,
    dense: options.Dense = None,
    lm_head: options.LmHead = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    system: Annotated[str | None, typer.Option(help="System message, for models with a chat template.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and leave.")] = None,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = "main",
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Load a model with its experts offloaded and talk to it.

    Ctrl-C stops an answer; Ctrl-C or Ctrl-D at the prompt leaves. When stdin is not a terminal each of its lines is a
    prompt.
    """
