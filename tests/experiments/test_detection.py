"""Sets of boxes: matched as scipy does, scored as COCO does, learnt from one batch."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.optimize import linear_sum_assignment

from experiments.core import optim
from experiments.core.report import rows_of
from experiments.data import detection as data
from experiments.data.fetch import DataError
from experiments.data.images import load, unpack
from experiments.detection import boxes, cells, experiment
from experiments.detection.cells import CentersCell, DetectTask, DetrCell
from experiments.detection.model import Heat, Predictions
from experiments.detection.precision import Detections, average_precision
from experiments.detection.report import REPORT, name_of

TOY = dict(pool=8, held=4, side=32, most=3, sizes=(8, 12))


@pytest.fixture(scope="module")
def toy():
    return data.load_detection("toy_scenes", **TOY)


# ------------------------------------------------------------------------ scenes


def test_a_smaller_set_of_scenes_begins_a_larger_one():
    digits = load("digits")
    few, more = (
        data.make_scenes(digits, n, part="train", side=32, sizes=(8,)) for n in (3, 5)
    )
    for name in ("images", "boxes", "labels"):
        assert (getattr(few, name) == getattr(more, name)[:3]).all()
    other = data.make_scenes(digits, 3, part="validation", side=32, sizes=(8,))
    assert (other.images != few.images).any()


@pytest.mark.parametrize("overlap", [False, True])
def test_boxes_are_tight_and_apart_unless_asked(overlap):
    digits = load("digits")
    scenes = data.make_scenes(
        digits, 40, part="train", side=32, most=4, sizes=(8, 12), overlap=overlap
    )
    counts, met = (scenes.labels >= 0).sum(axis=1), False
    assert set(counts) == {1, 2, 3, 4}
    for image, rows, count in zip(scenes.images, scenes.boxes, counts, strict=True):
        seen = np.zeros((32, 32), int)
        for x, y, w, h in rows[:count] * 32:
            left, top = round(x - w / 2), round(y - h / 2)
            inside = image[top : top + round(h), left : left + round(w), 0] > data.INK
            edges = inside[0], inside[-1], inside[:, 0], inside[:, -1]
            assert overlap or all(edge.any() for edge in edges)
            seen[top : top + round(h), left : left + round(w)] += 1
        met = met or (seen > 1).any()
        assert not image[seen == 0].any()  # nothing lies outside
        assert (rows[count:] == 0).all()
    assert met == overlap


def test_no_part_shows_an_image_of_another():
    digits = load("digits")
    train = np.full_like(digits.train_images, 100)
    train[len(train) - len(train) // 10 :] = 150
    marked = dataclasses.replace(
        digits, train_images=train, test_images=np.full_like(digits.test_images, 200)
    )
    for part, level in (("train", 100), ("validation", 150), ("test", 200)):
        scenes = data.make_scenes(marked, 40, part=part, side=32, sizes=(8,))
        assert set(np.unique(scenes.images)) == {0, level}


def test_a_task_says_what_it_is(toy):
    assert toy.describe().startswith("scenes-32px-3items-8-12-pool8-digits: 8 train (")
    assert "pictures of 32x32, 10 classes" in toy.describe()
    with pytest.raises(ValueError, match="task must be scenes, toy_scenes or coco:DIR"):
        data.load_detection("voc", **TOY)
    with pytest.raises(ValueError, match="sizes must be numbers of pixels from 4 to"):
        data.make_scenes(load("digits"), 1, part="train", side=8, sizes=(9,))
    with pytest.raises(ValueError, match="part must be one of train, validation, test"):
        data.make_scenes(load("digits"), 1, part="dev")


def coco(folder, part, boxes_of):
    """A folder in COCO's format: pictures of 40 x 20 with these boxes."""
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / f"{part}2017").mkdir()
    images, items = [], []
    for i, found in enumerate(boxes_of):
        pixels = np.zeros((20, 40, 3), np.uint8)
        images.append(dict(id=7 + i, file_name=f"{i}.png", width=40, height=20))
        for kind, (x, y, w, h) in found:
            pixels[y : y + h, x : x + w] = 255
            items.append(
                dict(image_id=7 + i, category_id=kind, bbox=[x, y, w, h], iscrowd=0)
            )
        Image.fromarray(pixels).save(folder / f"{part}2017" / f"{i}.png")
    categories = [dict(id=18, name="dog"), dict(id=3, name="car")]
    found = dict(images=images, annotations=items, categories=categories)
    (folder / "annotations" / f"instances_{part}2017.json").write_text(
        json.dumps(found)
    )


def test_pictures_in_the_format_of_coco_are_read(tmp_path):
    one, two = [(18, (0, 0, 20, 10))], [(3, (20, 10, 20, 10)), (18, (0, 0, 8, 4))]
    coco(tmp_path, "train", [one, two, [], [*one, *two]])
    coco(tmp_path, "val", [two])
    found = data.load_coco(tmp_path, side=16, most=2, pool=5, held=1)
    assert found.class_names == ("car", "dog")
    assert [len(p) for p in (found.train, found.validation, found.test)] == [1, 1, 1]
    np.testing.assert_allclose(found.train.boxes[0, 0], [0.25, 0.25, 0.5, 0.5])
    assert found.train.labels[0].tolist() == [1, -1]
    assert found.train.images.shape == (1, 16, 16, 3)
    assert found.train.images[0, :8, :8].min() == 255
    assert found.test.labels[0].tolist() == [0, 1]
    with pytest.raises(DataError, match="holds no instances_train"):
        data.load_coco(tmp_path / "no", side=16, most=2, pool=5, held=1)
    path = tmp_path / "annotations" / "instances_val2017.json"
    ill = ['{"images": []}', "[]", '{"categories": [{"id": 1}], "annotations": [3]}']
    ill.append(
        '{"categories": [{"id": 1, "name": "a"}], "images": [], "annotations": '
        '[{"image_id": 1, "category_id": 1, "bbox": []}]}'
    )
    for text in ill:
        path.write_text(text)
        with pytest.raises(DataError, match="is not in COCO's format"):
            data.load_coco(tmp_path, side=16, most=2, pool=5, held=1)


# ------------------------------------------------------------------------ boxes


def test_overlap_is_what_counting_pixels_gives():
    rng = np.random.default_rng(0)
    corner = rng.integers(0, 12, (2, 50, 2))
    size = rng.integers(1, 9, (2, 50, 2))
    given = np.concatenate([corner + size / 2, size], axis=-1) / 32
    found = boxes.overlap(*jnp.asarray(given, jnp.float32))
    grid = np.arange(32)
    for i in range(50):
        masks = []
        for (x, y), (w, h) in zip(corner[:, i], size[:, i], strict=True):
            inside = (grid >= y) & (grid < y + h), (grid >= x) & (grid < x + w)
            masks.append(inside[0][:, None] & inside[1][None])
        either = masks[0] | masks[1]
        rows, columns = np.nonzero(either)
        around = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        iou = (masks[0] & masks[1]).sum() / either.sum()
        assert found.iou[i] == pytest.approx(iou, abs=1e-5)
        generalised = iou - (around - either.sum()) / around
        assert found.generalised[i] == pytest.approx(generalised, abs=1e-5)


def test_boxes_of_no_size_have_no_nan_and_no_nan_gradient():
    def total(x):
        found = boxes.overlap(x, jnp.zeros(4))
        return found.iou + found.generalised

    value, slope = jax.value_and_grad(total)(jnp.zeros(4))
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_matching_costs_as_little_as_scipys():
    cost = np.random.default_rng(1).normal(size=(1_000, 6, 20)).astype(np.float32)
    found = np.asarray(jax.jit(boxes.assign)(cost))
    for matrix, chosen in zip(cost, found, strict=True):
        assert len(set(chosen)) == 6
        best = matrix[linear_sum_assignment(matrix)].sum()
        assert matrix[np.arange(6), chosen].sum() == pytest.approx(best, abs=1e-4)
    with pytest.raises(ValueError, match="as many predictions as items"):
        boxes.assign(jnp.zeros((3, 2)))
    assert len(set(np.asarray(boxes.assign(jnp.full((2, 3), jnp.nan))))) == 2


def predictions(rng, layers=2, batch=2, queries=5, classes=3):
    logits = rng.normal(size=(layers, batch, queries, classes + 1))
    places = rng.uniform(0.2, 0.6, (layers, batch, queries, 4))
    return Predictions(
        jnp.asarray(logits, jnp.float32), jnp.asarray(places, jnp.float32)
    )


def generalised(one, two):
    """Generalised overlap of two boxes, by their sides."""
    low, high = one[:2] - one[2:] / 2, one[:2] + one[2:] / 2
    low_2, high_2 = two[:2] - two[2:] / 2, two[:2] + two[2:] / 2
    shared = np.prod(np.maximum(np.minimum(high, high_2) - np.maximum(low, low_2), 0))
    union = np.prod(one[2:]) + np.prod(two[2:]) - shared
    around = np.prod(np.maximum(high, high_2) - np.minimum(low, low_2))
    return shared / union - (around - union) / around


def test_the_loss_of_a_set_is_that_of_its_definition():
    rng = np.random.default_rng(2)
    found = predictions(rng)
    labels = np.array([[1, 0, -1], [2, -1, -1]])
    there = rng.uniform(0.2, 0.6, (2, 3, 4)).astype(np.float32)
    loss = jax.jit(cells.set_loss, static_argnames="auxiliary")
    expected, total = loss(found, labels, there, auxiliary=True)[0], 0.0
    shares, told_boxes = np.asarray(jax.nn.softmax(found.logits)), np.asarray(found[1])
    for layer, told in zip(shares, told_boxes, strict=True):
        of_class, weight, of_boxes = 0.0, 0.0, 0.0
        for b in range(2):
            items = [m for m in range(3) if labels[b, m] >= 0]
            cost = np.zeros((len(items), 5))
            for r, q in np.ndindex(cost.shape):
                one, two = told[b, q], there[b, items[r]]
                cost[r, q] = 5 * np.abs(one - two).sum() - 2 * generalised(one, two)
                cost[r, q] -= layer[b, q, labels[b, items[r]]]
            rows, chosen = linear_sum_assignment(cost)
            target = np.full(5, 3)
            target[chosen] = [labels[b, items[r]] for r in rows]
            weights = np.where(target == 3, 0.1, 1.0)
            of_class -= (weights * np.log(layer[b, np.arange(5), target])).sum()
            weight += weights.sum()
            for r, q in zip(rows, chosen, strict=True):
                one, two = told[b, q], there[b, items[r]]
                of_boxes += 5 * np.abs(one - two).sum() + 2 - 2 * generalised(one, two)
        total += of_class / weight + of_boxes / 3
    assert expected == pytest.approx(float(total), rel=1e-5)
    last = loss(found, labels, there, auxiliary=False)[0]
    alone = Predictions(found.logits[-1:], found.boxes[-1:])
    assert last == pytest.approx(float(loss(alone, labels, there, auxiliary=True)[0]))


def test_neither_the_order_of_queries_nor_empty_rows_matter():
    rng = np.random.default_rng(3)
    found = predictions(rng)
    labels = jnp.array([[1, 0, -1], [2, -1, -1]])
    there = jnp.asarray(rng.uniform(0.2, 0.6, (2, 3, 4)), jnp.float32)
    order = jnp.array([3, 0, 4, 2, 1])
    turned = Predictions(found.logits[:, :, order], found.boxes[:, :, order])
    empty = jnp.where(labels[..., None] >= 0, there, 9.0)
    of = jax.jit(cells.set_loss, static_argnames="auxiliary")
    loss, told = of(found, labels, there, auxiliary=True)
    for one, two in ((turned, there), (found, empty)):
        other, also = of(one, labels, two, auxiliary=True)
        assert other == pytest.approx(float(loss), rel=1e-5)
        assert also["overlap"] == pytest.approx(float(told["overlap"]), rel=1e-5)
    nothing = jnp.full((2, 3), -1)
    slope = jax.jit(
        jax.grad(lambda f: cells.set_loss(f, nothing, there, auxiliary=True)[0])
    )(found)
    assert np.isfinite(slope.logits).all() and not np.asarray(slope.boxes).any()


def test_centres_are_where_items_are_and_only_peaks_are_told():
    labels = jnp.array([[1, 0, -1]])
    there = jnp.array([[[0.3, 0.6, 0.9, 0.9], [0.9, 0.1, 0.1, 0.3], [0.0] * 4]])
    heat, place = cells.heat_targets(labels, there, (4, 8), 2)
    assert heat.shape == (1, 4, 8, 2) and place[0, :2].tolist() == [[2, 2], [0, 7]]
    assert (heat == 1).sum() == 2 and heat[0, 2, 2, 1] == 1 and heat[0, 0, 7, 0] == 1
    assert 0 < heat[0, 2, 3, 1] < 1 and heat[0, 2, 2, 0] < 0.01
    sure = Heat(30.0 * heat - 15.0, jnp.zeros((1, 4, 8, 4)))
    scores, kinds, _ = cells.told_by_centers(sure, 3)
    assert (scores[0, :2] > 0.99).all() and set(kinds[0, :2].tolist()) == {0, 1}
    near = jax.nn.sigmoid(sure.logits)[0, 2, 3, 1]
    assert near > 0.9 and scores[0, 2] < 0.5  # the neighbours of a peak are none
    loss, told = cells.center_loss(sure, labels, there)
    assert np.isfinite(loss) and 0 <= told["overlap"] <= 1


# ------------------------------------------------------------------------ precision


def test_average_precision_of_what_is_known():
    there = data.Scenes(
        np.zeros((2, 8, 8, 1), np.uint8),
        np.array([[[0.3, 0.3, 0.4, 0.4], [0.8, 0.8, 0.2, 0.2]], [[0.5] * 4, [0] * 4]]),
        np.array([[0, 1], [0, -1]]),
    )
    labels = np.where(there.labels < 0, 0, there.labels)
    scores = (there.labels >= 0).astype(float)
    right = Detections(scores, labels, there.boxes)
    found = average_precision(right, there, 2)
    assert found["ap"] == pytest.approx(1) and found["ap_large"] == pytest.approx(1)
    # Of the small class nothing is found: half of the mean over classes.
    half = average_precision(right._replace(scores=scores * [1, 0]), there, 2)
    assert half["ap50"] == pytest.approx(0.5)
    # Moved by a fifth of a side boxes overlap by 2/3: right at .5 to .65, not at .75.
    moved = there.boxes + np.array([0.2, 0, 0, 0]) * there.boxes[..., 2:3]
    found = average_precision(right._replace(boxes=moved), there, 2)
    assert found["ap50"] == pytest.approx(1) and found["ap75"] == 0
    assert found["ap"] == pytest.approx(0.4, abs=0.01)
    wrong = average_precision(right._replace(labels=1 - labels), there, 2)
    assert wrong["ap"] == 0
    none = average_precision(right._replace(scores=0 * scores), there, 2)
    assert none == dict(ap=0, ap50=0, ap75=0)
    with pytest.raises(ValueError, match="must be of 2 pictures, got 1"):
        average_precision(Detections(*(x[:1] for x in right)), there, 2)


# ------------------------------------------------------------------------ learning


def small(toy, kind, **more):
    shared = dict(
        task=toy.name,
        seed=0,
        updates=200,
        n=8,
        batch_size=8,
        widths=(8, 16),
        learning_rate=3e-3,
        weight_decay=0.0,
    )
    if kind == "centers":
        return CentersCell(model=kind, blocks=1, told=6, **shared | more)
    sizes = dict(depth=1, decoder_depth=2, num_heads=2, num_queries=6)
    return DetrCell(model=kind, dim=32, mlp_dim=64, **shared | sizes | more)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detr", "centers"])
def test_one_batch_is_learnt_by_heart(toy, kind):
    task, cell = DetectTask(toy), small(toy, kind, updates=600)
    program = task.program(cell)
    state = optim.init_state(program.initial_params(0), task.hyper(cell))
    step = jax.jit(optim.make_step(program.loss), donate_argnums=0)
    batch = jax.device_put(task.batches(cell)[0])
    for _ in range(cell.updates):
        state, _ = step(state, batch, jax.random.key(0))
    assert task.precision(cell, state.params, toy.train)["ap50"] >= 0.95


def test_what_is_scored_and_shown_of_a_model(toy):
    task = DetectTask(toy)
    cell = small(toy, "detr")
    params = task.program(cell).initial_params(0)
    tuned = task.score(dataclasses.replace(cell, phase="tune"), params)
    assert {"val_ap", "val_ap50", "train_ap50"} <= set(tuned)
    assert not any(name.startswith("test") for name in tuned)
    found = task.score(cell, params)
    assert {"test_ap", "test_ap50", "shown", "classes", "map_size"} <= set(found)
    looks = np.array(found["query_looks"])
    assert looks.shape == (6, 64)
    np.testing.assert_allclose(looks.sum(axis=1), 1, atol=0.01)
    for place, weights in found["place_looks"]:
        assert 0 <= place < 64 and sum(weights) == pytest.approx(1, abs=0.01)
    picture = unpack(found["shown"][0]["image"], (32, 32, 1))
    assert (picture == toy.test.images[0]).all()
    told = task.detections(cell, params, toy.test.images)
    alone = task.detections(cell, params, toy.test.images[2:3])
    np.testing.assert_allclose(told.boxes[2], alone.boxes[0], atol=1e-5)
    json.dumps(found)
    with pytest.raises(ValueError, match="n must be at most 8"):
        task.batches(small(toy, "detr", n=9))


def test_choices_see_validation_scenes_and_the_test_part_is_for_final_cells(toy):
    task, seen = DetectTask(toy), []
    task.precision = lambda cell, params, part: (
        seen.append(part) or dict(ap=0.5, ap50=0.5)
    )
    cell = small(toy, "centers", seed=1, n=5)
    for phase, held in (("tune", toy.validation), ("final", toy.test)):
        seen.clear()
        found = task.score(dataclasses.replace(cell, phase=phase), None)
        assert seen[0] is held and found["train_ap"] == 0.5
        assert (seen[1].images == toy.train.images[:4]).all()
    seen.clear()
    assert task.observe(cell, None) == dict(val_ap50=0.5)
    assert (seen[0].images == toy.validation.images).all()
    # Of n scenes the first are trained on, and no others.
    rows = {tuple(b.boxes[0, 0]) for b in map(task.batches(cell).__getitem__, range(9))}
    assert rows <= {tuple(b[0]) for b in toy.train.boxes[:5]}


def test_mean_boxes_are_of_training_scenes():
    def part(box):
        boxes = np.tile(np.float32(box), (3, 1, 1))
        return data.Scenes(
            np.zeros((3, 8, 8, 1), np.uint8), boxes, np.zeros((3, 1), np.int32)
        )

    here, there = part([0.3, 0.3, 0.2, 0.2]), part([0.7, 0.7, 0.2, 0.2])
    given = dict(name="t", source="", sha256="", class_names=("a", "b"))
    for train, test, ap in ((here, here, 1.0), (here, there, 0.0)):
        found = data.Detection(train=train, validation=there, test=test, **given)
        assert cells.mean_boxes(found)["test_ap"] == pytest.approx(ap)


def test_rows_are_told_apart_and_a_variant_is_one_flag(toy, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("from attn_jax.attention import dot_product as attend\n")
    config = dataclasses.replace(
        experiment.PRESETS["smoke"],
        ns=(4, 8),
        without=tuple(experiment.WITHOUT),
        attention=f"{mine}:attend",
        same_cross=True,
    )
    studies = experiment.studies_of(config, "scenes-32px-x")
    made = [study.grid[0] for study in studies]
    assert len({cell.label for cell in made}) == len(made) == 8
    (own,) = [cell for cell in made if getattr(cell, "attention_sha256", None)]
    assert own.attention == f"{mine}:attend" and own.cross == "same"
    program = DetectTask(toy).program(dataclasses.replace(own, task=toy.name))
    assert jax.tree.leaves(jax.eval_shape(lambda: program.initial_params(0)))
    # Of fewer scenes the rate is that of the most.
    assert [s.tuned_by is not None for s in studies if "n=4" in s.name] == [True, True]
    records = [
        dict(config=cell.config() | dict(phase="final"), status="done", metrics={})
        for cell in made
    ]
    names = {name_of(row) for row in rows_of(records) if row.config["n"] == 8}
    assert names == {
        "DETR",
        "map of centres (convolutions)",
        "DETR without encoder",
        "DETR without positions",
        "DETR without auxiliary losses",
        "DETR with mine.py:attend (queries too)",
    }
    coco(tmp_path, "train", [[(3, (0, 0, 20, 10))]] * 3)
    coco(tmp_path, "val", [[(3, (0, 0, 20, 10))]])
    mine = dataclasses.replace(config, task=f"coco:{tmp_path}", ns=(9,), held=1)
    with pytest.raises(ValueError, match="ns must be at most 2, the training pictures"):
        experiment.plans(mine)
    with pytest.raises(ValueError, match="num_queries must be at least most=6"):
        experiment.Config(num_queries=5)
    with pytest.raises(ValueError, match="without must be given with model detr alone"):
        experiment.Config(models=("centers",), without=("encoder",))


def test_a_report_tells_models_and_floors_apart(tmp_path):
    def record(model, seed, ap, **more):
        config = dict(task="scenes-32px-x", model=model, phase="final", seed=seed, n=8)
        config |= dict(updates=5, batch_size=2, learning_rate=0.1, num_queries=4)
        if model == "detr":
            config |= dict(attention="dot_product", cross="dot_product", depth=1)
            config |= dict(positions=True, auxiliary=True) | more
        metrics = dict(test_ap=ap, test_ap50=ap, params=3, flops=4e6)
        curves = dict(step=[2, 4], observed_at=[0, 2, 4], val_ap50=[0.0, ap / 2, ap])
        return dict(config=config, status="done", metrics=metrics, curves=curves)

    floor = dict(task="scenes-32px-x", model="mean_boxes", phase="baseline", seed=0)
    records = [dict(config=floor, status="done", metrics=dict(test_ap=0.01), curves={})]
    for seed in range(3):
        records.append(record("detr", seed, 0.5 + seed / 100))
        records.append(record("centers", seed, 0.3 + seed / 100))
        records.append(record("detr", seed, 0.4 - seed / 9, depth=0))
    text = REPORT.write(records, tmp_path)
    assert "| DETR | 8 | .510 ± .010 |" in text
    assert "| mean box of each class, without looking | – | .010 |" in text
    apart = "DETR less map of centres (convolutions) +.200 [+.200, +.200], clear."
    assert apart in text
    assert "DETR without encoder less DETR −.221 [" in text
    assert (tmp_path / "curves.png").is_file()
    assert "one learning rate, which was given" in text
    # Seeds of other points, a second section, and a rate at an end of the grid.
    records[1]["curves"] = dict(step=[4], observed_at=[0, 4], val_ap50=[0.0, 0.5])
    tried = [record("detr", 0, 0.1) for _ in range(2)]
    for entry, rate in zip(tried, (0.1, 0.2), strict=True):
        entry["config"] |= dict(phase="tune", updates=1, learning_rate=rate)
    longer = record("centers", 0, 0.3)
    longer["config"] |= dict(updates=9)
    text = REPORT.write([*records, *tried, longer], tmp_path)
    assert "may lie beyond: DETR." in text
    assert "of 0.1, 0.2, at the largest N" in text
    assert (tmp_path / "curves_scenes-32px-x_9.png").is_file()
