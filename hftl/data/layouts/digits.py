"""Embedded dataset: the 1,797 handwritten digits of scikit-learn.

Source: UCI Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, CC BY 4.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from datasets import Dataset
    from sklearn.utils import Bunch

# constant, so that the test split is the same for all users and seeds
_SPLIT_SEED, _TEST_ROWS, _VALIDATION_ROWS = 0, 600, 200


def load_digits() -> dict[str, Dataset]:
    """Returns train (997), validation (200) and test (600) rows of 8x8 gray images with labels 0..9, stratified."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = cast("Bunch", load())  # a tuple only with return_X_y=True
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rest, test = train_test_split(
        np.arange(len(pixels)), test_size=_TEST_ROWS, random_state=_SPLIT_SEED, stratify=digits.target
    )
    train, validation = train_test_split(
        rest, test_size=_VALIDATION_ROWS, random_state=_SPLIT_SEED, stratify=digits.target[rest]
    )
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return {
        split: Dataset.from_dict(
            {"image": [PILImage.fromarray(pixels[i]) for i in rows], "label": digits.target[rows].tolist()},
            features=features,
        )
        for split, rows in (("train", train), ("validation", validation), ("test", test))
    }
