"""Do models go together? Differences that make a mixture impossible are errors, doubtful ones are warnings.

Reads configs, headers and tokenizers only; `checks` compares the weights of experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from transformers_moe_offload.builder.sources import Source
from transformers_moe_offload.errors import RecipeError

_TOKENIZER = "tokenizer.json"
_SHOULD_AGREE = ("rope_parameters", "rms_norm_eps", "layer_norm_eps", "norm_eps")


def expect_fitting(sources: Sequence[Source], layers: Sequence[int], names: Callable[[int], Mapping[str, str]]) -> None:
    """Raise `RecipeError` unless every source has, in every layer, a block that fits into the base model."""
    base = sources[0]
    for source in sources[1:]:
        for field in ("num_hidden_layers", "hidden_size", "hidden_act"):
            ours, theirs = getattr(base.config, field, None), getattr(source.config, field, None)
            if ours != theirs:
                raise RecipeError(
                    f"{source.name} has {field} {theirs}, but the base model {base.name} has {ours}; take experts from "
                    f"models of one architecture and size (only the width of blocks may differ)"
                )
        _expect_vocabulary(base, source)
    for source in sources:
        for layer in layers:
            for role, name in names(layer).items():
                if name not in source.tensors:
                    raise RecipeError(
                        f"{source.name} has no {name}, the {role} matrix of layer {layer}; its blocks are of another "
                        f"kind than the base model's ({source.config.model_type}, {base.config.model_type})"
                    )


def expect_mergeable(stems: Sequence[Source], names: Sequence[str]) -> None:
    """Raise `RecipeError` unless all models have these tensors in the same shape."""
    base = stems[0]
    for source in stems[1:]:
        for name in names:
            found = source.tensors.get(name)
            if found is None or found.shape != base.tensors[name].shape:
                raise RecipeError(
                    f"stem: {name} is {list(base.tensors[name].shape)} in {base.name} and "
                    f"{list(found.shape) if found else 'missing'} in {source.name}; models whose attention and "
                    f"embeddings are merged have to be of one size, so set stem.method to base"
                )


def compare(sources: Sequence[Source], stems: Sequence[Source]) -> Iterator[str]:
    """Warnings about experts that do not quite match the model around them."""
    base = stems[0]
    for source in dict.fromkeys(sources):
        for field in _SHOULD_AGREE:
            ours, theirs = getattr(base.config, field, None), getattr(source.config, field, None)
            if ours is not None and theirs is not None and ours != theirs:
                yield (
                    f"{source.name} was trained with {field} {theirs}, and {base.name}, whose attention and norms are "
                    f"used, has {ours}; its experts will see hidden states that are new to them"
                )
        added = _added_tokens(base, source)
        if added:
            yield (
                f"{source.name} has {len(added)} tokens that {base.name} does not have ({', '.join(added[:4])}); the "
                f"mixture has the embeddings of {base.name}, so its experts will never see them"
            )


def _expect_vocabulary(base: Source, source: Source) -> None:
    """The same token has to have the same number in both."""
    ours, theirs = _vocabulary(base), _vocabulary(source)
    if ours is None or theirs is None:
        if base.config.vocab_size != source.config.vocab_size:
            raise RecipeError(
                f"{source.name} has a vocabulary of {source.config.vocab_size}, the base model {base.name} one of "
                f"{base.config.vocab_size}, and there are no {_TOKENIZER} files to tell whether the tokens that both "
                f"have are the same; add them, or take models of one vocabulary"
            )
        return
    moved = [token for token, number in theirs.items() if token in ours and ours[token] != number]
    if moved:
        raise RecipeError(
            f"{len(moved)} tokens have other numbers in {source.name} than in the base model {base.name}, as "
            f"{moved[0]!r}: {theirs[moved[0]]} and {ours[moved[0]]}; take models of one vocabulary"
        )


def _added_tokens(base: Source, source: Source) -> list[str]:
    ours, theirs = _vocabulary(base), _vocabulary(source)
    return [] if ours is None or theirs is None else [token for token in theirs if token not in ours]


def _vocabulary(source: Source) -> dict[str, int] | None:
    """Tokens and their numbers; None where no file has them."""
    path = next((file for file in source.companions if file.name == _TOKENIZER), None)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores, in their order
        vocabulary = {piece[0]: number for number, piece in enumerate(vocabulary)}
    return {**vocabulary, **added}
