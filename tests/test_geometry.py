"""Joint transforms of images, masks and boxes; the reference is the transformed image itself."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from hftl.config.schema import AugmentConfig
from hftl.errors import ArtifactError, DataError
from hftl.preprocessing.joint_transforms import GeometryProcessor, GeometryRows, Places, augment_problems

COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
NO_AUGMENT = AugmentConfig(crop_scale=1, hflip=0, color_jitter=0)


def processor(size=(48, 64), augment=NO_AUGMENT, interpolation="nearest"):
    config = {"input_size": (3, *size), "interpolation": interpolation, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return GeometryProcessor(config, augment)


def draw_boxes(height, width, boxes):
    """Returns a black image with colored boxes, and its mask: 0 for black, 1.. for the boxes."""
    pixels, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    for number, (left, top, right, bottom) in enumerate(boxes):
        pixels[top:bottom, left:right] = COLORS[number]
        mask[top:bottom, left:right] = number + 1
    return PILImage.fromarray(pixels), Places(torch.from_numpy(mask), torch.tensor(boxes, dtype=torch.float32))


def mask_of(pixel_values):
    """Returns the mask of normalized pixels by color."""
    bright = pixel_values * 0.25 + 0.5 > 0.5
    return torch.where(bright.any(0), bright.int().argmax(0) + 1, 0)


def bounding_box(mask, value):
    ys, xs = (mask == value).nonzero(as_tuple=True)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(30, 90), st.integers(30, 90)),
    scale=st.sampled_from([0.3, 0.7, 1.0]),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_transform_pixels_match_mask_and_boxes(seed, size, scale, flip):
    height, width = size
    boxes = [
        (width * left // 30, height * top // 30, width * right // 30, height * bottom // 30)
        for left, top, right, bottom in ((1, 2, 9, 13), (12, 3, 28, 14), (5, 17, 25, 29))
    ]
    image, places = draw_boxes(height, width, boxes)
    torch.manual_seed(seed)
    augment = AugmentConfig(crop_scale=scale, hflip=flip, color_jitter=0.1)
    moved = processor((96, 80), augment).transform(True)(image, places)
    assert moved.pixel_values.shape == (3, 96, 80) and moved.pixel_values.dtype == torch.float32
    mask = mask_of(moved.pixel_values)
    # "nearest" and "nearest-exact" differ by half a pixel: pixels may differ at edges only
    assert (mask != moved.mask).float().mean() < 0.12
    for box, number in zip(moved.boxes, moved.kept, strict=True):
        pixel = 96 / (height * 0.3)  # largest size of an image pixel in the input
        assert (bounding_box(moved.mask, number + 1) - box).abs().max() <= pixel + 1
        assert (bounding_box(mask, number + 1) - box).abs().max() <= pixel + 1
    removed = set(range(3)) - set(moved.kept.tolist())
    areas = {n: (b[2] - b[0]) * (b[3] - b[1]) / (height * width) for n, b in enumerate(boxes)}
    for number in removed:  # its visible area is smaller than that of a full box in the crop
        assert (moved.mask == number + 1).float().mean() < 0.6 * areas[number] / scale
    if scale == 1:
        assert not removed


def test_eval_transform_resizes_and_scales_boxes():
    image, places = draw_boxes(20, 40, [(0, 0, 10, 20), (30, 5, 40, 15)])
    moved = processor((60, 40)).transform(False)(image, places)
    assert moved.boxes.tolist() == [[0, 0, 10, 60], [30, 15, 40, 45]]
    assert torch.equal(moved.mask, mask_of(moved.pixel_values))
    assert processor((60, 40)).transform(False)(image).mask is None


def test_transform_removes_empty_and_thin_boxes():
    image, _ = draw_boxes(40, 40, [])
    boxes = torch.tensor([[5, 5, 5, 20], [2, 2, 20, 20], [-30, 0, 2, 40], [0, 0, 50, 38], [10, 10, 10.2, 20]])
    moved = processor((40, 40)).transform(False)(image, Places(boxes=boxes.float()))
    assert moved.kept.tolist() == [1, 3] and moved.boxes[1].tolist() == [0, 0, 40, 38]
    empty = processor().transform(False)(image, Places(boxes=torch.zeros(0, 4)))
    assert empty.boxes.shape == (0, 4) and empty.kept.shape == (0,)


def make_rows(folder, count, seed, find_places=None):
    for number in range(count):
        draw_boxes(30 + number, 40, [(3, 4, 20, 25)])[0].save(folder / f"{number}.png")
    table = {"image": [str(folder / f"{number}.png") for number in range(count)], "left": [3] * count}
    data = Dataset.from_dict(table, features=Features({"image": Image(), "left": Value("int64")}))

    def one_box(values, size):
        left = values["left"]
        return Places(boxes=torch.tensor([[left, 4.0, 20, 25]]), mask=torch.ones(size, dtype=torch.uint8))

    find_places = find_places or one_box
    return GeometryRows(data, "image", processor(augment=AugmentConfig()), seed, find_places, split="train")


def test_rows_augmentation_depends_on_seed_epoch_and_row(tmp_path):
    encoded = make_rows(tmp_path, 3, seed=7)
    state = torch.get_rng_state()
    first = encoded.fetch([0, 1, 2], 1)
    assert torch.equal(torch.get_rng_state(), state)
    repeated = encoded.fetch([2], 1)[0]
    assert torch.equal(first[2]["pixel_values"], repeated["pixel_values"])
    assert torch.equal(first[2]["moved"].boxes, repeated["moved"].boxes)
    assert not torch.equal(encoded.fetch([2], 2)[0]["pixel_values"], repeated["pixel_values"])
    assert repeated["size"] == (32, 40) and repeated["left"] == 3


def test_rows_annotation_error_returns_row_number(tmp_path):
    def raise_error(values, size):
        raise DataError(f"invalid box in {size}")

    with pytest.raises(DataError, match=r"train row 1: invalid box in \(31, 40\)"):
        make_rows(tmp_path, 2, None, raise_error).fetch([1], 0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_save_matches_transformers_image_processor(tmp_path, interpolation):
    from transformers import AutoImageProcessor

    rng = np.random.default_rng(0)
    image = PILImage.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    saved = processor((32, 48), AugmentConfig(), interpolation)
    saved.save(tmp_path)
    expected = saved.transform(False)(image).pixel_values
    reference = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(reference).__name__ == "SegformerImageProcessor"
    assert (reference(image, return_tensors="pt")["pixel_values"][0] - expected).abs().max() < 1e-5
    opened = GeometryProcessor.open(tmp_path)
    assert torch.equal(opened.transform(False)(image).pixel_values, expected)
    assert opened.size == (32, 48) and not opened.augment.any
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="image_mean"):
        GeometryProcessor.open(tmp_path)


def test_augment_problems_rejects_auto_augment():
    assert not augment_problems(AugmentConfig())
    (problem,) = augment_problems(AugmentConfig(auto_augment="rand-m9"))
    assert "rand-m9" in problem and "crop_scale" in problem
