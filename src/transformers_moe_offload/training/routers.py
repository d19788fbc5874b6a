"""`RouterWatch` sees the scores of routers while a model is trained; `RouterRegulariser` keeps routers from collapsing
or becoming overconfident, or makes them choose what they have chosen lately.

Every architecture calls its routers in its own way; common to all is that a router's first output with an entry for
each expert is its scores, before a softmax or after it. All that changes training is off by default:

- balance: `E * sum_i f_i * P_i` per layer, the share of tokens that choose an expert times its mean probability (Switch
  Transformers, arXiv 2101.03961, equations 4 to 6). 1 when all experts are used equally.
- z: the mean square of the logits' logsumexp (ST-MoE, arXiv 2202.08906, equation 5).
- jitter: a router's input is multiplied by numbers between 1 - jitter and 1 + jitter (Switch Transformers, section 2.2
  and appendix; `router_jitter_noise` in Transformers).
- dropout: of a router's input.
- locality: how much of what tokens choose was not chosen by the `locality_window` tokens before them (`locality.py`).

The losses are means over the tokens that the attention mask keeps, as Transformers' own balance loss is
(`load_balancing_loss_func` in `models/mixtral/modeling_mixtral.py`, 5.23).
"""

# B sequences, S their length, T tokens, K experts per token, E experts

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.hf.layouts import layout_of
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts, layer_of
from transformers_moe_offload.hf.routers.top_k import experts_per_token
from transformers_moe_offload.training.locality import follows_in, locality_loss
from transformers_moe_offload.training.recipes import experts_paths, router_paths


class RouterWatch:
    """Calls `scored` with a router's scores, logits (T, E), each time a router is called."""

    def __init__(self, model: nn.Module, scored: Callable[[Tensor], None]) -> None:
        module = model.get_submodule(experts_paths(model)[0])
        self.num_experts = _num_experts(module)
        self._scored = scored
        self._handles = [model.get_submodule(path).register_forward_hook(self._called) for path in router_paths(model)]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _called(self, router: nn.Module, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        for tensor in outputs:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[-1] >= self.num_experts:
                self._scored(as_logits(tensor.reshape(-1, tensor.shape[-1]).float()))
                return


class RouterRegulariser:
    """Adds to `output.loss` of a model that is being trained, until `remove`.

    Padding does not count where the forward is given `attention_mask` (B, S) by name, except in models with an encoder
    and a decoder, whose tokens have two masks. With `num_items_in_batch`, which Trainer passes to all forwards of a
    step, a forward adds its losses times its share of the step's labels: so a step adds a mean over its forwards,
    however many there are.

    A forward with gradients raises `ConfigError` if it returns no loss, or if adding to the loss would have no effect.
    """

    def __init__(
        self,
        model: Any,
        *,
        balance: float = 0.0,
        z: float = 0.0,
        jitter: float = 0.0,
        dropout: float = 0.0,
        locality: float = 0.0,
        locality_window: int = 1,
    ) -> None:
        for name, value in (("balance", balance), ("z", z), ("locality", locality)):
            if not value >= 0:
                raise ConfigError(f"{name}={value} is not the weight of a loss; choose 0 (off) or more")
        for name, value in (("jitter", jitter), ("dropout", dropout)):
            if not 0 <= value < 1:
                raise ConfigError(f"{name}={value} is not a share; choose 0 (off) or more, but less than 1")
        if isinstance(locality_window, bool) or not isinstance(locality_window, int) or locality_window < 1:
            raise ConfigError(f"locality_window={locality_window!r} is not a number of tokens; choose 1 or more")
        self.balance, self.z, self.jitter, self.dropout = balance, z, jitter, dropout
        self.locality, self.locality_window = locality, locality_window
        self.last: dict[str, float] = {}
        """The latest values of the losses, before weights."""
        self._logits: list[Tensor] = []
        """Logits of the running forward. Recomputation for gradients comes after it and adds none."""
        self._is_running = False
        self._has_encoder = bool(getattr(model.config, "is_encoder_decoder", False))
        if locality and self._has_encoder:
            raise ConfigError(
                "locality=... compares neighbouring tokens of one text, and this model reads two; set it to 0"
            )
        path = experts_paths(model)[0]
        self._top_k = experts_per_token(model, path.replace(".base_layer", "")) or 1
        # Methods of this object, so that a copy of the model comes with a copy of it.
        self._watch = RouterWatch(model, self._scored)
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._add, with_kwargs=True, always_call=True),
        ]
        if jitter or dropout:
            routers = [model.get_submodule(router) for router in router_paths(model)]
            self._handles += [router.register_forward_pre_hook(self._disturb) for router in routers]

    def remove(self) -> None:
        """Remove all hooks."""
        self._watch.remove()
        for handle in self._handles:
            handle.remove()

    def _disturb(self, router: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not router.training or not args:
            return None
        hidden = args[0]
        if self.jitter:
            hidden = hidden * torch.empty_like(hidden).uniform_(1 - self.jitter, 1 + self.jitter)
        return (functional.dropout(hidden, self.dropout), *args[1:])

    def _begin(self, model: nn.Module, args: Any) -> None:
        self._logits, self._is_running = [], True

    def _scored(self, logits: Tensor) -> None:
        if self._is_running:
            self._logits.append(logits)

    def _add(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        logits, self._logits, self._is_running = self._logits, [], False
        if not model.training or not logits or output is None:  # None where the forward failed
            return
        if torch.is_grad_enabled() and (self.balance or self.z or self.locality):
            _expect_effect(logits, output)
        if getattr(output, "loss", None) is None:
            return
        mask = None if self._has_encoder else kwargs.get("attention_mask")
        locality = self._locality(logits, args, kwargs) if self.locality else None
        logits = [one for one in (without_padding(one, mask) for one in logits) if len(one)]
        if not logits:
            return
        balance = torch.stack([balance_loss(one, self._top_k) for one in logits]).mean()
        z = torch.stack([z_loss(one) for one in logits]).mean()
        self.last = {"balance": balance.item(), "z": z.item()}
        added = (self.balance * balance + self.z * z).to(output.loss.device)
        if locality is not None:
            self.last["locality"] = locality.item()
            added = added + self.locality * locality.to(added.device)
        output.loss = output.loss + added * share_of_step(kwargs, is_shifted=not self._has_encoder).to(added.device)

    def _locality(self, logits: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The mean over all routers, with gradients."""
        follows = follows_in(len(logits[0]), kwargs, args)
        losses = [locality_loss(one, self._top_k, follows.to(one.device), self.locality_window) for one in logits]
        return torch.stack([one.to(losses[0].device) for one in losses]).mean()


def as_logits(scores: Tensor) -> Tensor:
    """scores (T, E), logits or probabilities -> logits (T, E)."""
    with torch.no_grad():
        is_distribution = bool(((scores >= 0).all() & (scores.sum(-1) - 1).abs().lt(1e-3).all()).item())
    return scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if is_distribution else scores


def entropy(logits: Tensor) -> float:
    """Mean entropy of the routers' distributions in nats: logits (T, E); log E for uniform ones."""
    with torch.no_grad():
        return torch.distributions.Categorical(logits=logits).entropy().mean().item()


def _num_experts(module: nn.Module) -> int:
    if isinstance(module, OffloadedExperts):
        return layer_of(module).num_experts
    layout = layout_of(module)
    assert layout is not None
    return layout.num_experts(module)


def _expect_effect(logits: list[Tensor], output: Any) -> None:
    """Raise where the regulariser would have no effect on training."""
    if getattr(output, "loss", None) is None:
        raise ConfigError(
            f"balance, z and locality are added to output.loss, and this forward returned a {type(output).__name__} "
            f"without one; pass labels, and not return_dict=False"
        )
    if not any(one.requires_grad for one in logits):
        raise ConfigError(
            "the routers' scores have no gradient, so balance, z and locality would change nothing; train the routers "
            "or layers before them, and checkpoint with activation_checkpointing_kwargs={'use_reentrant': False}"
        )


def without_padding(logits: Tensor, attention_mask: Any) -> Tensor:
    """The rows that a mask (B, S) keeps: logits (T, E); all of them where the rows are not the mask's tokens."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.numel() != len(logits):
        return logits
    return logits[attention_mask.flatten().to(logits.device) != 0]


def share_of_step(kwargs: dict[str, Any], *, is_shifted: bool) -> Tensor:
    """The share of a step's labels that a forward has: (); 1 where one of the two numbers is not known.

    Trainer divides a loss by the number of forwards in a step only where the model has not divided it by
    `num_items_in_batch` (`Trainer.training_step`, 5.23).
    """
    num_items, labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    if labels is None and isinstance(kwargs.get("labels"), Tensor):
        # A decoder without an encoder predicts no first token.
        labels = kwargs["labels"][..., 1:] if is_shifted else kwargs["labels"]
    if num_items is None or labels is None:
        return torch.ones(())
    return (labels != -100).sum() / torch.as_tensor(num_items, device=labels.device).flatten()[0]


def balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """logits (T, E) -> (), 1 when all experts are used equally."""
    num_experts = logits.shape[-1]
    chosen = functional.one_hot(logits.topk(top_k).indices, num_experts).float().sum(1)
    share = chosen.mean(0) / top_k
    return num_experts * (share * logits.softmax(-1).mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """logits (T, E) -> ()."""
    return logits.logsumexp(-1).square().mean()
