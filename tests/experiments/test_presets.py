"""What every preset runs: a changed setting, default or name would orphan results."""

from __future__ import annotations

import hashlib
import types

import pytest

from experiments.attention_as_conv import experiment as conv
from experiments.attention_vs_rnn import experiment as rnn
from experiments.core.store import config_hash
from experiments.data_scaling import experiment as scaling
from experiments.detection import experiment as detection
from experiments.gan import experiment as gan
from experiments.graphs import experiment as graphs
from experiments.long_range import experiment as arena
from experiments.offsets import experiment as offsets
from experiments.positions import experiment as positions
from experiments.pretraining import experiment as pretraining
from experiments.seq2seq import experiment as seq2seq
from experiments.sequence_labelling import experiment as labelling

# The hash of all hashes of a preset's cells, as far as they are known without the data.
PINNED = {
    "pretraining smoke": "ca22975e6407d494",
    "pretraining quick": "098f2e7f9cd190f8",
    "pretraining cpu": "b1fd6840a07cd1cd",
    "pretraining variants": "deda4bf5ddf6e90f",
    "pretraining accelerator": "3b47eca67df80ee8",
    "pretraining base": "863989afe06e01ce",
    "detection smoke": "71608ec85dde7174",
    "detection quick": "983f4ea623f0077e",
    "detection cpu": "ed92c9044b728b9b",
    "detection accelerator": "230479faf2125764",
    "gan smoke": "1017720e8a063ace",
    "gan quick": "96b9188bb53c2bc7",
    "gan cpu": "5ad6efe5ab64c0bc",
    "gan accelerator": "a76b7df9580a9ccb",
    "seq2seq smoke": "6a555cbe7033fee4",
    "seq2seq smoke_verses": "ea583c8d3191f875",
    "seq2seq quick": "0444133d2f9ad745",
    "seq2seq cpu": "858c58295faffb2d",
    "seq2seq verses_quick": "7119bb7d5d2a371a",
    "seq2seq verses": "618bb1b8c5803a8a",
    "seq2seq table3": "2ef6eba277230b72",
    "seq2seq accelerator": "a3b71b0ccac6e642",
    "seq2seq verses_accelerator": "c0408b9d6a912ab9",
    "long_range smoke": "098174bd2e052fe0",
    "long_range quick": "85242285567b1eb6",
    "long_range cpu": "c8013fa5851d5d17",
    "long_range pathfinder": "c09f233e3c762726",
    "long_range pretrained": "fbf9f7e85cc3699e",
    "long_range paper": "25e522ec951c6674",
    "long_range accelerator": "79e03ac6ded22397",
    "data_scaling smoke": "22832302ab1a8205",
    "data_scaling quick": "cc9bcc64c4d46e06",
    "data_scaling images": "75bba4067feb5f17",
    "data_scaling cpu": "1a5f152d0114219a",
    "data_scaling accelerator": "e4d3389250115bfc",
    "data_scaling scenes": "908db66d369ecc58",
    "data_scaling smoke_sequences": "1ccd7de827ba4f8d",
    "data_scaling phones": "30ae2c8dc7acc668",
    "data_scaling pos": "ff7c9802f8922928",
    "attention_as_conv quick": "a455612a7fdc4ef9",
    "attention_as_conv cpu": "d2922ea7d85402e3",
    "attention_as_conv teacher": "7c8b76553c35e2d7",
    "attention_as_conv long": "44c33ac5f5bb5a0e",
    "attention_as_conv accelerator": "9d15804b9afb98c3",
    "sequence_labelling smoke": "5b359b078bdab932",
    "sequence_labelling smoke_phones": "09593cf3ecd5dd8b",
    "sequence_labelling quick": "eb59e18d7eb6901e",
    "sequence_labelling pos": "cc49adf971b12a45",
    "sequence_labelling pos_fine": "79d89caee3240438",
    "sequence_labelling phones": "12205cab9b20351a",
    "sequence_labelling heads": "e54f5628cf0a4d1b",
    "offsets smoke": "a5fe15dd746d928e",
    "offsets smoke_relations": "ef84fa894cee9ee4",
    "offsets quick": "10fb4491bae86cc7",
    "offsets k_back": "38a2cf3483901d30",
    "offsets relations": "5ebac38194c225e8",
    "attention_vs_rnn quick": "4c57253e4ddba8a1",
    "attention_vs_rnn cpu": "a23dd685ad559a25",
    "attention_vs_rnn accelerator": "9671613e9248ad10",
    "graphs quick": "8805bd481f560f68",
    "graphs cpu": "6800b13d3c19afb2",
    "graphs accelerator": "253a59e44fa20a44",
    "positions smoke": "e74c61189fc848e0",
    "positions quick": "94755ddf751f4d94",
    "positions cpu": "a26d585cb64bac82",
}


def of_studies(studies):
    """Every cell that may be run, the grids of one cell too."""
    for study in studies:
        yield from study.grid
        yield from study.possible()


def cells(name, config):
    """The cells of a preset on data called "t"."""
    if name == "data_scaling" and config.task in scaling.sequences.TASKS:
        return of_studies(scaling.sequences.studies_of(config, "t"))
    if name == "data_scaling":
        shape = (30, 30, 1) if config.task == "scenes" else (28, 28, 1)
        return of_studies(scaling.studies_of(config, "t", shape))
    if name == "attention_as_conv":
        taught = "teacher" in config.parts
        more = conv.teacher_plan(config).studies if taught else ()
        return of_studies([*conv.make_studies(config, "t").values(), *more])
    if name == "sequence_labelling":
        return of_studies(labelling.plan_studies(config, "t").values())
    if name == "offsets":
        return of_studies(offsets.studies_of(config))
    if name == "long_range":
        tasks = [(task, 1024 if task == "pathfinder" else 96) for task in config.tasks]
        return of_studies(arena.studies_of(config, dict(tasks)))
    if name == "detection":
        return of_studies(detection.studies_of(config, "t"))
    if name == "gan":
        return of_studies(gan.studies_of(config, "t", 9))
    if name == "seq2seq":
        return of_studies(seq2seq.studies_of(config))
    if name == "pretraining":
        before = [pretraining.pretraining(config, a) for a in config.rows]
        rows = (
            pretraining.studies_of(config, task, task, 50_000, before)
            for task in config.tasks
        )
        return of_studies([*before, *(study for some in rows for study in some)])
    if name == "attention_vs_rnn":
        sizes = dict(length=784, height=28)
        copies = rnn._studies(config, "copy", config.copy_models)
        return of_studies(
            [*copies, *rnn._studies(config, "t", config.image_models, **sizes)]
        )
    if name == "graphs":
        graph = types.SimpleNamespace(sha256="0")
        lookup = of_studies(graphs.dictionary_plan(config).studies)
        nodes = (graphs.node_cell(config, graph, m, 5) for m in config.node_models)
        return [*lookup, *nodes]
    return [
        positions.cell_of(config, types.SimpleNamespace(name=task), encoding)
        for task in config.tasks
        for encoding in config.encodings
    ]


MODULES = (
    scaling,
    conv,
    labelling,
    offsets,
    rnn,
    graphs,
    positions,
    arena,
    seq2seq,
    detection,
    gan,
    pretraining,
)
PRESETS = {
    f"{m.EXPERIMENT.name} {name}": (m.EXPERIMENT.name, config)
    for m in MODULES
    for name, config in m.PRESETS.items()
}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_cells_of_a_preset_are_pinned(preset):
    hashes = sorted({config_hash(c.config()) for c in cells(*PRESETS[preset])})
    found = hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]
    assert found == PINNED[preset]
