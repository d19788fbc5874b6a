"""`add_expert`, `drop_expert`, `replace_expert`: decide how every tensor changes; `rewrite_files.py` writes the result.

Experts keep their order; a new one comes last, and those behind one that is dropped move up.
"""

# E experts, H hidden size

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from transformers_moe_offload.builder.edit import new_values
from transformers_moe_offload.builder.edit.expert_tensors import SparseBlock, SparseCheckpoint
from transformers_moe_offload.builder.edit.new_values import Copied, Donor, FromDense, Row, expect_number, grown
from transformers_moe_offload.builder.edit.rewrite_files import Edit, Written, carried_out
from transformers_moe_offload.builder.gates import STATISTICS_NAME, RidgeStatistics, drop_expert_gate
from transformers_moe_offload.builder.recipe import Expert, Origin
from transformers_moe_offload.builder.recipe.origin import as_origin
from transformers_moe_offload.builder.sources import Source, open_source
from transformers_moe_offload.errors import CheckpointError, RecipeError

logger = logging.getLogger(__name__)


def add_expert(
    folder: str | Path,
    expert: Expert,
    *,
    copy_of: int | None = None,
    gate: Row | None = None,
    noise_scale: float = 0.0,
    seed: int = 0,
    base: str | Origin | None = None,
    out: str | Path | None = None,
    device: str = "cpu",
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Add an expert to a mixture; returns where the mixture is.

    Files without changes are kept. The old mixture stays complete until the new one is.

    Args:
        folder: a checkpoint that `build_moe` has written, or another one whose experts are stored one by one.
        expert: where its weights come from, what it is called, and texts that should be routed to it.
        copy_of: start from this expert of the mixture instead of a dense model.
        gate: its row in every router: `mean` of the others' rows, the number of an expert to copy rows from, or rows by
            layer. None means ridge regression on `expert`'s texts where the mixture's statistics are beside it and
            `base` is given; otherwise the rows of `copy_of`, or the mean.
        noise_scale: of noise on rows that are copied or a mean, relative to their elements' size.
        seed: of the noise.
        base: the dense model that the mixture was made around; for ridge regression and for `expert.delta_scale`.
        out: write there, and leave `folder` as it is.
        device: where `base`'s layers run.
        token: as in `from_pretrained`.
        local_files_only: as in `from_pretrained`.
    """
    checkpoint = SparseCheckpoint.of(Path(folder))
    config = checkpoint.config_for(checkpoint.num_experts + 1)
    hub = {"token": token, "local_files_only": local_files_only}
    donor, opened = _donor(checkpoint, expert, copy_of, base, hub)
    name = _name(expert, copy_of, checkpoint.num_experts)
    has_texts = bool(expert.positive_prompts or expert.dataset)
    statistics = checkpoint.folder / STATISTICS_NAME
    is_ridge = gate is None and has_texts and statistics.is_file() and opened is not None
    row: Row = gate if gate is not None else "mean" if copy_of is None else copy_of
    new_values.expect_row(row, checkpoint)
    target = Path(folder if out is None else out)
    with ExitStack() as stack:
        rows: Callable[[SparseBlock], Tensor]
        if is_ridge:
            assert opened is not None
            found = _spare_folder(target, stack) / STATISTICS_NAME
            rows = new_values.ridge_rows(checkpoint, expert, opened, statistics, found, device)
        else:
            rows = partial(new_values.with_row, checkpoint, row, noise_scale, seed)
            _warn_of(statistics)
        written = []
        for block in checkpoint.blocks:
            for name_for, like in _places(block).items():
                spec = checkpoint.spec(like, name_for.format(checkpoint.num_experts))
                written.append(Written(spec, partial(donor.one, block, name_for), like))
            for of_all, axis in block.stacked.items():
                is_router = of_all == block.router
                read = partial(rows, block) if is_router else partial(grown, checkpoint, donor, block, of_all)
                written.append(Written(checkpoint.spec(of_all, axis=axis, more=1), read, of_all))
        edit = Edit(
            what=f"Expert {checkpoint.num_experts}, {name}, was added.",
            config=config,
            names=_unchanged(checkpoint, written),
            written=written,
            expert_names=lambda names: [*names, name],
        )
        with carried_out(checkpoint, edit, None if out is None else Path(out)) as place:
            if is_ridge:
                found.replace(place / STATISTICS_NAME)
    return target


def drop_expert(folder: str | Path, number: int, *, out: str | Path | None = None) -> Path:
    """Take an expert out of a mixture; those behind it move up. The others' rows stay as they are.

    Args:
        folder: a checkpoint that `build_moe` has written, or another one whose experts are stored one by one.
        number: which, counted from 0.
        out: write there, and leave `folder` as it is.
    """
    checkpoint = SparseCheckpoint.of(Path(folder))
    expect_number(number, checkpoint, "number")
    config = checkpoint.config_for(checkpoint.num_experts - 1)
    names, written = {}, []
    experts = {name: found for block in checkpoint.blocks for name, found in block.experts.items()}
    stacked = {name: axis for block in checkpoint.blocks for name, axis in block.stacked.items()}
    for name in checkpoint.tensors:
        if name in stacked:
            spec = checkpoint.spec(name, axis=stacked[name], more=-1)
            written.append(Written(spec, partial(new_values.without, checkpoint, name, stacked[name], number), name))
        elif name not in experts:
            names[name] = name
        elif experts[name][0] != number:
            expert, name_for = experts[name]
            names[name] = name_for.format(expert - (expert > number))
    edit = Edit(
        what=f"Expert {number} was dropped; those behind it moved up.",
        config=config,
        names=names,
        written=written,
        expert_names=lambda names: [name for position, name in enumerate(names) if position != number],
    )
    statistics = checkpoint.folder / STATISTICS_NAME
    with carried_out(checkpoint, edit, None if out is None else Path(out)) as place:
        if statistics.is_file():
            with suppress(RecipeError):  # it may refuse the rows it computes, which are not used
                drop_expert_gate(RidgeStatistics(statistics), number, place / STATISTICS_NAME)
    return Path(folder if out is None else out)


def replace_expert(
    folder: str | Path,
    number: int,
    expert: Expert,
    *,
    copy_of: int | None = None,
    gate: Row | None = None,
    noise_scale: float = 0.0,
    seed: int = 0,
    base: str | Origin | None = None,
    out: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Replace an expert by another; as `add_expert`, but without `gate` the routers keep their rows."""
    checkpoint = SparseCheckpoint.of(Path(folder))
    expect_number(number, checkpoint, "number")
    hub = {"token": token, "local_files_only": local_files_only}
    donor, _ = _donor(checkpoint, expert, copy_of, base, hub)
    row: Row = number if gate is None else gate
    new_values.expect_row(row, checkpoint)
    name = _name(expert, copy_of, number)
    _warn_of(checkpoint.folder / STATISTICS_NAME)
    written = []
    for block in checkpoint.blocks:
        for one, (at, place) in block.experts.items():
            if at == number:
                written.append(Written(checkpoint.spec(one), partial(donor.one, block, place), one))
        for stack, axis in block.stacked.items():
            if stack == block.router:
                value = partial(new_values.row_of, row, checkpoint, block, noise_scale, seed)
            elif len(checkpoint.tensors[stack].shape) > 2 or copy_of is not None:
                value = partial(donor.part, block, stack)
            else:
                continue
            read = partial(new_values.exchanged, checkpoint, stack, axis, number, value)
            written.append(Written(checkpoint.spec(stack), read, stack))
    edit = Edit(
        what=f"Expert {number} is now {name}.",
        config=checkpoint.config,
        names=_unchanged(checkpoint, written),
        written=written,
        expert_names=lambda names: [name if position == number else one for position, one in enumerate(names)],
    )
    with carried_out(checkpoint, edit, None if out is None else Path(out)):
        return Path(folder if out is None else out)


def _unchanged(checkpoint: SparseCheckpoint, written: Sequence[Written]) -> dict[str, str]:
    changed = {one.spec.name for one in written}
    return {name: name for name in checkpoint.tensors if name not in changed}


def _donor(
    checkpoint: SparseCheckpoint, expert: Expert, copy_of: int | None, base: str | Origin | None, hub: dict[str, Any]
) -> tuple[Donor, Source | None]:
    """The donor of a new expert's weights; and the base model, opened."""
    opened = None if base is None else open_source(as_origin(base), **hub)
    if (copy_of is None) == (expert.source is None):
        raise RecipeError(
            "give either expert.source, a dense model to make the expert of, or copy_of, an expert to start from"
        )
    if copy_of is not None:
        expect_number(copy_of, checkpoint, "copy_of")
        return Copied(checkpoint, copy_of), opened
    assert expert.source is not None
    return FromDense(checkpoint, expert, open_source(expert.source, base=opened, **hub), opened), opened


def _name(expert: Expert, copy_of: int | None, number: int) -> str:
    if expert.name:
        return expert.name
    return f"expert {number}, a copy of {copy_of}" if expert.source is None else str(expert.source)


def _places(block: SparseBlock) -> dict[str, str]:
    """Names of one expert's tensors, with `{}` for its number -> an existing tensor, whose file takes the new one."""
    last = max((expert for expert, _ in block.experts.values()), default=0)
    return {place: name for name, (expert, place) in block.experts.items() if expert == last}


def _spare_folder(target: Path, stack: ExitStack) -> Path:
    """A temporary folder for a file until its place exists; on the same disk, so that the file can be moved."""
    parent = target.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(stack.enter_context(TemporaryDirectory(dir=parent, prefix=".gates-")))
    except OSError as error:
        raise CheckpointError(f"cannot write to {parent}: {error.strerror}") from error


def _warn_of(statistics: Path) -> None:
    if statistics.is_file():
        logger.warning("%s does not hold for the mixture any more and is left out.", statistics.name)
