"""A recipe's experts as blocks: which part of which model goes into which expert, and how wide experts get.

Pure: knows sources by number and by the width of their blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers_moe_offload.builder.recipe import Expert, MoeRecipe, Origin
from transformers_moe_offload.builder.weights.blocks import Block, Part
from transformers_moe_offload.errors import RecipeError
from transformers_moe_offload.untrusted import quoted


@dataclass(frozen=True)
class Mixture:
    """The experts that a layer's router chooses from, and the shared block that every token visits."""

    experts: tuple[Block, ...]
    shared: Block | None
    """None where there is no shared block."""
    names: tuple[str, ...]
    """The experts' names; an empty one stands for the name of the source."""
    sums: tuple[tuple[Block, ...], ...]
    """By expert: the blocks of dense models whose sum a token gets if it visits this expert only, with weight 1: the
    expert's source, and the shared expert unless the source includes it."""
    base_sum: tuple[Block, ...]
    """The blocks of such a sum where the base model's block is the expert."""
    is_shared_gated: bool = False

    def width(self, widths: Sequence[int]) -> int:
        """The widest expert, given the widths of the sources' blocks."""
        return max(block_width(block, widths) for block in self.experts)

    def shared_width(self, widths: Sequence[int]) -> int:
        """The width of the shared block; 0 if there is none."""
        return block_width(self.shared, widths) if self.shared else 0

    def halved_gate(self) -> Mixture:
        """The mixture with its shared block doubled, for containers that always gate it: gates of zeros halve it."""
        if self.shared is None or self.is_shared_gated:
            return self
        return replace(self, shared=Block(tuple(replace(part, scale=2 * part.scale) for part in self.shared.parts)))


def block_width(block: Block, widths: Sequence[int]) -> int:
    """Channels of an expert, given the widths of the sources' blocks."""
    return sum(-(-widths[part.source] // part.count) for part in block.parts)


def origins_of(recipe: MoeRecipe) -> tuple[Origin, ...]:
    """The models that experts are made of, each once; the base model is the first."""
    named = [recipe.base_model, *(expert.source for expert in (*recipe.experts, *recipe.shared_experts))]
    return tuple(dict.fromkeys(origin for origin in named if origin is not None))


def expect_possible(recipe: MoeRecipe, width: int) -> None:
    """Raise `RecipeError` for more copies or parts than make sense for a block of `width` channels.

    Copies cost nothing until they are written, so a plan of a billion experts would fill the memory first. A part has
    at least one channel, and the largest routers of our containers choose from some hundred experts.
    """
    limit = max(width, 1024)
    asked = recipe.num_experts if recipe.split is None else recipe.split.num_experts
    if asked > limit:
        raise RecipeError(
            f"{recipe.kind} asks for {quoted(asked)} experts, but at most {limit:,} are made of the base model's "
            f"blocks, which have {width:,} channels; set num_experts or granularity to less"
        )


def mixture_of(recipe: MoeRecipe) -> Mixture:
    """The experts that a recipe asks for."""
    if recipe.split is not None:
        return _split(recipe)
    origins, asked = origins_of(recipe), recipe.shared_experts
    shared = [_part(recipe, origins, expert, f"shared {n}") for n, expert in enumerate(asked)]
    block = Block(tuple(shared)) if shared else None
    is_gated = any(expert.gated for expert in asked)
    ungated = None if is_gated else block
    if recipe.upcycle is not None:
        experts, names = _copies(recipe)
        sums = _with_shared(experts, ungated)
    else:
        parts = [_part(recipe, origins, expert, f"expert {n}") for n, expert in enumerate(recipe.experts)]
        of_shared = list(zip(shared, asked, strict=True))
        # The weights of a token's experts add up to 1, so that experts and shared expert add up to the sources.
        taken = [replace(part, scale=-part.scale) for part, expert in of_shared if expert.delta]
        left = tuple(part for part, expert in of_shared if not expert.delta)
        experts = tuple(Block((part, *taken)) for part in parts)
        names = tuple(expert.name or "" for expert in recipe.experts)
        sums = _with_shared([Block((part,)) for part in parts], Block(left) if left and not is_gated else None)
    return Mixture(experts, block, names, sums, _base_sum(ungated), is_gated)


def _part(recipe: MoeRecipe, origins: Sequence[Origin], expert: Expert, seed: str) -> Part:
    source = 0 if expert.source is None else origins.index(expert.source)
    return Part.of(expert, source, f"{recipe.seed}/{seed}")


def _copies(recipe: MoeRecipe) -> tuple[tuple[Block, ...], tuple[str, ...]]:
    """Copies of one block, each cut into parts (arXiv 2410.07524).

    A token's experts have weights that add up to 1, but the parts of a block have to be added with weight 1 each.
    Scaled by the number of parts, the sum over all experts with equal weights is the dense block. The paper scales each
    matrix by the third root; scaling `down` alone is exact, as the activation is not linear.
    """
    assert recipe.upcycle is not None
    asked = recipe.upcycle
    experts, names = [], []
    for copy in range(asked.num_experts):
        for index in range(asked.granularity):
            part = Part(
                scale=float(asked.granularity),
                index=index,
                count=asked.granularity,
                reinitialize=asked.reinitialize,
                seed=f"{asked.seed}/copy {copy} part {index}",
            )
            experts.append(Block((part,)))
            names.append(f"copy {copy}" if asked.granularity == 1 else f"copy {copy} part {index}")
    return tuple(experts), tuple(names)


def _split(recipe: MoeRecipe) -> Mixture:
    """Parts of one block, some of them for every token; scaled as copies are."""
    assert recipe.split is not None
    count, num_shared = recipe.split.num_experts, recipe.split.shared
    shared = tuple(Part(index=index, count=count) for index in range(num_shared))
    routed = tuple(
        Block((Part(scale=float(recipe.split.num_routed), index=index, count=count),))
        for index in range(num_shared, count)
    )
    names = tuple(f"part {index}" for index in range(num_shared, count))
    block = Block(shared) if shared else None
    return Mixture(routed, block, names, _with_shared(routed, block), _base_sum(block))


def _base_sum(shared: Block | None) -> tuple[Block, ...]:
    return _with_shared([Block((Part(),))], shared)[0]


def _with_shared(experts: Sequence[Block], shared: Block | None) -> tuple[tuple[Block, ...], ...]:
    return tuple((expert, shared) if shared else (expert,) for expert in experts)
