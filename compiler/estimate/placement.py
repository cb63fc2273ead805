"""Which layers a pipeline rank holds: even or uneven stages, interleaved or not, dense layers and mixtures of experts.

As Megatron-Core 0.16 cuts them (`get_num_layers_to_build`, `get_transformer_layer_offset`): the embedding and the loss may each
take the place of a layer, or the first and the last stage hold stated numbers and the others share the rest.
"""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.estimate.layouts import Floats, Ints, Layouts
from trainwright.compiler.plan import Layout, Shape


@dataclass(frozen=True)
class Held:
    """Layers of a rank by kind, one row a layout; fractions only where a layout is illegal."""

    dense: Floats
    mixtures: Floats

    @property
    def all(self) -> Floats:
        return self.dense + self.mixtures


def mixtures_before(shape: Shape, layers: Floats) -> Floats:
    """Mixtures among the first `layers` layers."""
    if not shape.num_experts:
        return np.zeros_like(np.asarray(layers, dtype=np.float64))
    past = np.maximum(np.asarray(layers, dtype=np.float64) - shape.first_dense_layers, 0.0)
    return past if shape.moe_every == 1 else np.floor(past / shape.moe_every)


def kinds_of(shape: Shape) -> tuple[bool, ...]:
    """Whether each kind of layer that a shape has is a mixture."""
    mixtures = num_mixtures(shape)
    return (*((False,) if mixtures < shape.num_layers else ()), *((True,) if mixtures else ()))


def num_mixtures(shape: Shape) -> int:
    """Layers whose FFN is a mixture of experts."""
    return int(mixtures_before(shape, np.array(shape.num_layers, dtype=np.float64)))


def ranks_of(layouts: Layouts) -> tuple[Ints, Ints, Ints]:
    """Columns of the pipeline ranks that differ: the first, the one after it, the last (where there is one, all are it)."""
    last = layouts.pipeline - 1
    return np.zeros_like(last), np.minimum(1, last), last


def stage_layers(num_layers: int, layouts: Layouts, rank: Ints) -> Floats:
    """Layers of a pipeline rank (a column: 0 to pipeline - 1), all its chunks together."""
    first, last = rank == 0, rank == layouts.pipeline - 1
    pipelined = layouts.pipeline > 1
    stands_in = pipelined * (1.0 * layouts.embedding_as_layer + layouts.loss_as_layer)
    even = (num_layers + stands_in) / layouts.pipeline
    even = even - pipelined * (first & layouts.embedding_as_layer) - pipelined * (last & layouts.loss_as_layer)
    stated_first, stated_last = (
        pipelined & (column > 0) for column in (layouts.first_stage_layers, layouts.last_stage_layers)
    )
    stages = layouts.pipeline - stated_first - 1 * stated_last
    rest = num_layers - stated_first * layouts.first_stage_layers - stated_last * layouts.last_stage_layers
    middle = rest / np.maximum(stages, 1)
    uneven = np.where(
        first & stated_first,
        layouts.first_stage_layers,
        np.where(last & stated_last, layouts.last_stage_layers, middle),
    )
    return np.asarray(np.maximum(np.where(stated_first | stated_last, uneven, even), 0.0), dtype=np.float64)


def chunks_of(num_layers: int, layout: Layout, rank: int) -> tuple[range, ...]:
    """The layers, by their places in the model, of each chunk of a pipeline rank of a legal layout."""
    pipeline, chunks = layout.pipeline, layout.virtual_pipeline
    if layout.embedding_as_layer or layout.loss_as_layer:
        slots = (num_layers + layout.embedding_as_layer + layout.loss_as_layer) // (pipeline * chunks)
        starts = [(chunk * pipeline + rank) * slots - layout.embedding_as_layer for chunk in range(chunks)]
        return tuple(range(max(start, 0), min(start + slots, num_layers)) for start in starts)
    first, last = layout.first_stage_layers, layout.last_stage_layers
    others = pipeline - (first > 0) - (last > 0)
    middle = (num_layers - first - last) // max(others, 1)
    held = [middle] * pipeline
    held[0], held[-1] = first or held[0], last or held[-1]
    starts = [(chunk * num_layers + sum(held[:rank])) // chunks for chunk in range(chunks)]
    return tuple(range(start, start + held[rank] // chunks) for start in starts)


def is_mixture(shape: Shape, layer: int) -> bool:
    """Whether the FFN of the layer at this place, from 0, is a mixture of experts."""
    before, with_it = (int(mixtures_before(shape, np.array(float(count)))) for count in (layer, layer + 1))
    return with_it > before


def layers_on(shape: Shape, layouts: Layouts, rank: Ints) -> Held:
    """The layers of a pipeline rank by kind. With interleaving a rank's chunks are spread over the model."""
    layers = stage_layers(shape.num_layers, layouts, rank)
    if not shape.num_experts:
        return Held(layers, np.zeros_like(layers))
    before = np.zeros_like(layers)  # layers of the ranks before this one
    for other in range(int(layouts.pipeline.max(initial=1))):
        before += np.where(other < rank, stage_layers(shape.num_layers, layouts, np.full_like(rank, other)), 0.0)
    mixtures = np.zeros_like(layers)
    chunks = layouts.virtual_pipeline
    for chunk in range(int(chunks.max(initial=1))):
        start = (chunk * shape.num_layers + before) / chunks
        some = mixtures_before(shape, start + layers / chunks) - mixtures_before(shape, start)
        mixtures += np.where(chunk < chunks, some, 0.0)
    mixtures = np.minimum(mixtures, layers)
    return Held(layers - mixtures, mixtures)
