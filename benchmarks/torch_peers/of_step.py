"""The peer of a training step of an experiment, found by the kind of its cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from torch import nn

from benchmarks.steps import Step
from benchmarks.torch_peers import (
    decoding,
    detection,
    graphs,
    images,
    labelling,
    pairs,
    reading,
)
from benchmarks.torch_peers.attention_image import AttentionImage
from benchmarks.torch_peers.params import fill, flat_params
from experiments.attention_as_conv.cells import ConvCell
from experiments.attention_as_conv.cells import build_model as build_conv
from experiments.attention_vs_rnn.cells import LINEAR_CHUNK, DecoderCell, Shape, build
from experiments.attention_vs_rnn.data import START
from experiments.data import molecules
from experiments.data.pairs import PAD
from experiments.data_scaling.experiment import ScalingCell, build_model, shape_of
from experiments.detection.cells import DetectCell, DetrCell
from experiments.detection.cells import Shape as DetectShape
from experiments.detection.cells import build as build_detector
from experiments.detection.model import map_size
from experiments.graphs.cells import MoleculeCell, NodeCell
from experiments.graphs.regression import _COLUMNS
from experiments.long_range.cells import LongCell
from experiments.seq2seq.cells import PairCell
from experiments.tasks.labelling import LabelCell


def _labels(step: Step, params: Any) -> nn.Module:
    cell, data = step.cell, step.task.data
    model = labelling.peer(
        vars(cell), data.inputs, len(data.class_names), data.max_length
    )
    hides = cell.id_dropout if data.has_unknown else 0.0
    return labelling.LabelLoss(fill(model, flat_params(params)), hides)


def _images(step: Step, params: Any, channels_last: bool = False) -> nn.Module:
    cell, dataset = step.cell, step.task.dataset
    shape, classes = dataset.image_shape, dataset.num_classes
    if isinstance(cell, ConvCell) and cell.model != "resnet":
        names = "patch dim depth mlp_dim num_heads key_dim".split()
        sizes = {name: getattr(cell, name) for name in names}
        model: Any = AttentionImage(shape, classes, encoding=cell.model, **sizes)
    elif isinstance(cell, ConvCell):
        model = images.from_nnx(build_conv(cell, shape, classes))
    else:
        model = images.from_nnx(build_model(shape_of(cell, dataset), 0))
    more = step.hyper.more
    return images.ImageLoss(
        fill(model, flat_params(params)),
        more["pixel_mean"],
        more["pixel_std"],
        float(more["label_smoothing"]),
        flip=cell.flip,
        channels_last=channels_last,
    )


def _decoder(step: Step, params: Any) -> nn.Module:
    shape = Shape.of(step.cell)
    model = decoder_of(shape, params)
    if shape.components is None:
        return decoding.CopyLoss(model)
    return decoding.PixelLoss(model, START)


def decoder_of(shape: Shape, params: Any) -> decoding.Decoder:
    """The peer of a decoder with parameters of ours."""
    ours = build(shape, 0)
    assert ours.head is not None and ours.positions is not None
    peer = decoding.Decoder(
        shape.model,
        ours.embed.num_embeddings,
        ours.head.out_features,
        dim=shape.dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        table=np.asarray(ours.positions[...]),
        chunk=LINEAR_CHUNK,
    )
    return fill(peer, flat_params(params))


def _nodes(step: Step, params: Any) -> nn.Module:
    cell, graph = step.cell, step.task.nodes.graph
    if cell.score != "gatv2" or cell.propagated:
        raise ValueError("step: the PyTorch peer is of 'gatv2' without propagation.")
    names = "dim depth num_heads head_dim mlp_dim reads_labels".split()
    model = graphs.GraphLabeller(
        cell.features,
        len(graph.class_names),
        num_kinds=len(graph.kind_names) + 1 if cell.kinds else 0,
        **{name: getattr(cell, name) for name in names},
    )
    return graphs.NodeLoss(fill(model, flat_params(params)), cell.shown)


def _molecules(step: Step, params: Any) -> nn.Module:
    cell = step.cell
    columns = _COLUMNS[cell.pairs]
    model = graphs.GraphRegressor(
        molecules.ATOM_SIZES,
        sees_edges=cell.sees == "edges",
        pair_sizes=[molecules.PAIR_SIZES[i] for i in columns],
        **{name: getattr(cell, name) for name in "dim depth num_heads mlp_dim".split()},
    )
    return graphs.MoleculeLoss(fill(model, flat_params(params)), columns)


def _pairs(step: Step, params: Any) -> nn.Module:
    cell, data = step.cell, step.task.data
    usual = cell.model == "transformer" and cell.norm == "pre"
    usual = usual and cell.key_dim is None and not data.shared
    if not usual or cell.positions != "sinusoidal":
        raise ValueError(
            "step: the PyTorch peer is of the pre-norm Transformer with a sinusoid, "
            "keys as large as values, and a table for each side."
        )
    names = "dim depth num_heads mlp_dim dropout_rate".split()
    model = pairs.EncoderDecoder(
        data.num_source,
        data.num_target,
        length=step.task.shape(cell).longest,
        **{name: getattr(cell, name) for name in names},
    )
    filled = fill(model, flat_params(params))
    return pairs.PairLoss(filled, PAD, cell.label_smoothing)


def _reader(step: Step, params: Any) -> nn.Module:
    shape = step.task.shape(step.cell)
    if shape.attention != "dot_product" or shape.pairs or shape.pretrains:
        raise ValueError(
            "step: the PyTorch peer is of exact attention on single sequences."
        )
    names = "model dim depth mlp_dim num_heads attention positions dtype".split()
    traits = {name: getattr(shape, name) for name in names} | dict(dropout_rate=0.0)
    sizes = (shape.symbols, *[shape.symbols + 1] * shape.bigram)
    model = labelling.peer(traits, sizes, shape.classes, shape.length)
    loss = reading.ReadLoss(
        model, each=shape.each, bigram=shape.bigram, none=shape.symbols
    )
    return fill(loss, flat_params(params))


def _detector(step: Step, params: Any) -> nn.Module:
    shape = DetectShape.of(step.cell, step.task.data)
    ours: Any = build_detector(shape, 0)
    cell = step.cell
    model: nn.Module
    if not isinstance(cell, DetrCell):
        model = detection.Map(ours, shape.num_classes)
        return detection.CenterLoss(fill(model, flat_params(params)))
    if cell.attention != "dot_product":
        raise ValueError("step: the PyTorch peer is of exact attention.")
    names = "dim depth decoder_depth mlp_dim num_heads dropout_rate".split()
    model = detection.Set(
        ours,
        map_size(shape.image_shape, cell.widths),
        classes=shape.num_classes,
        **{name: getattr(cell, name) for name in names},
    )
    return detection.SetLoss(fill(model, flat_params(params)), cell.auxiliary)


_OF_CELL: Mapping[type, Callable[..., nn.Module]] = {
    LabelCell: _labels,
    ScalingCell: _images,
    ConvCell: _images,
    DecoderCell: _decoder,
    NodeCell: _nodes,
    MoleculeCell: _molecules,
    PairCell: _pairs,
    LongCell: _reader,
    DetectCell: _detector,
}


def loss_of(step: Step, params: Any, **options: Any) -> nn.Module:
    """The loss of a step in PyTorch, with a copy of parameters of ours.

    Args:
      step: of an experiment.
      params: as of its program.
      **options: ``channels_last``, of images.

    Raises:
      ValueError: if there is no peer of the model.
    """
    for kind, make in _OF_CELL.items():
        if isinstance(step.cell, kind):
            return make(step, params, **options)
    raise ValueError(f"step: there is no PyTorch peer of a {type(step.cell).__name__}.")


def arrays_of(step: Step) -> tuple[np.ndarray, ...]:
    """The batch of a step as its peer takes it."""
    return tuple(np.array(x, order="C") for x in jax.tree.leaves(step.batch))


def still(step: Step) -> Step:
    """The step without what it draws: flips, hidden words, labels that are read."""
    names = dict(flip=False, crop=0, id_dropout=0.0, shown=0.0, dropout_rate=0.0)
    fixed = {name: x for name, x in names.items() if hasattr(step.cell, name)}
    return step.of(dataclasses.replace(step.cell, **fixed))
