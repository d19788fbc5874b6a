"""`moe-offload plan`: where the weights of an offloaded model would be, before anything is downloaded."""

from __future__ import annotations

from moe_offload_cli import options


def plan(
    model: options.Model,
    cache_budget: options.CacheBudget = "auto",
    experts: options.Experts = None,
    layers: options.Layers = None,
    hot: options.Hot = None,
    trace: options.HotTrace = None,
    hot_share: options.HotShare = None,
    dense: options.Dense = None,
    lm_head: options.LmHead = None,
    dtype: options.Dtype = "auto",
    revision: options.Revision = "main",
    token: options.Token = None,
    local_files_only: options.LocalFilesOnly = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show where a model's weights would be, how many experts fit into the cache, and what a token would read.

    With `--experts`, `--dense` or `--lm-head`, for a model that is quantized while it is loaded. Reads the config and
    the index of the checkpoint; downloads no weights.
    """
