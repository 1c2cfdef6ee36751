"""Processor of images, texts, numbers and categories into inputs of `modeling_image_text`.

This file needs torch, timm and transformers only. It is saved with every model, so that
`AutoProcessor.from_pretrained(folder, trust_remote_code=True)` loads it without hftl.
"""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, BatchFeature
from transformers.utils import cached_file

FILE = "processor_config.json"


def category_ids(rows, known):
    """Returns category ids [B, M]: one plus the position in the `known` values of the column, 0 for other values.

    Args:
        rows: B rows of M values.
        known: Known values of each of the M columns.
    """
    ids = [{value: i + 1 for i, value in enumerate(values)} for values in known]
    keys = [[int(v) if isinstance(v, float) and v.is_integer() else v for v in row] for row in rows]
    encoded = [
        [0 if key is None else column.get(str(key), 0) for column, key in zip(ids, row, strict=True)] for row in keys
    ]
    return torch.tensor(encoded, dtype=torch.long).view(len(rows), len(known))


class ImageTextProcessor:
    """Processor that prepares batches of model inputs.

    Args:
        tokenizer: Tokenizer of the text encoder; None without texts.
        image: timm's data config of the image encoder (input_size, interpolation, mean, std, crop_pct); None without
            images.
        max_length: Tokens that texts are truncated to; None: the tokenizer's limit, at most 512.
        numbers: Names of the numeric columns.
        categories: Values of each categorical column, by column name.
    """

    model_input_names = ("pixel_values", "input_ids", "attention_mask")

    def __init__(self, tokenizer=None, image=None, max_length=None, numbers=(), categories=None):
        self.tokenizer = tokenizer
        self.image = image
        self.max_length = max_length
        self.numbers = list(numbers)
        self.categories = dict(categories or {})
        self.transform = None

    def __call__(self, images=None, text=None, numbers=None, categories=None):
        """Returns a batch of tensors. All arguments are lists of equal length, or None.

        Args:
            images: PIL images; None for a row without image.
            text: Texts; None for a row without text.
            numbers: List of numbers per row, in the order of `numbers`; None for a missing number.
            categories: List of values per row, in the order of `categories`; values absent from training are encoded
                as unknown.
        """
        inputs = {}
        if images is not None:
            images = list(images) if isinstance(images, (list, tuple)) else [images]
            inputs |= self._images(images)
        if text is not None:
            inputs |= self._texts([text] if isinstance(text, str) else list(text))
        if numbers is not None:
            values = [[float("nan") if value is None else float(value) for value in row] for row in numbers]
            inputs["numbers"] = torch.tensor(values, dtype=torch.float32)
        if categories is not None:
            inputs["categories"] = category_ids(categories, list(self.categories.values()))
        return BatchFeature(inputs)

    def _images(self, images):
        if self.transform is None:
            from timm.data import create_transform

            self.transform = create_transform(**self.image, is_training=False)
        size = tuple(self.image["input_size"])
        mode = "L" if size[0] == 1 else "RGB"
        pixels = [torch.zeros(size) if image is None else self.transform(image.convert(mode)) for image in images]
        present = torch.tensor([image is not None for image in images])
        return {"pixel_values": torch.stack(pixels), "image_present": present}

    def _texts(self, texts):
        max_length = self.max_length or min(self.tokenizer.model_max_length, 512)
        encoded = self.tokenizer(
            [text or "" for text in texts], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: encoded[name] for name in names if name in encoded}
        return inputs | {"text_present": torch.tensor([bool(text and text.strip()) for text in texts])}

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """Does nothing; called by AutoProcessor, while `save_pretrained` always writes `auto_map`."""

    @classmethod
    def from_pretrained(cls, path_or_repo_id, **kwargs):
        """Loads a processor saved by `save_pretrained`, from a folder or the Hub."""
        options = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
        config = json.loads(Path(cached_file(path_or_repo_id, FILE, **options)).read_text(encoding="utf-8"))
        tokenizer = None
        if config["text"]:
            tokenizer = AutoTokenizer.from_pretrained(path_or_repo_id, trust_remote_code=False, **options)
        return cls(tokenizer, *(config[key] for key in ("image", "max_length", "numbers", "categories")))

    def save_pretrained(self, folder, **kwargs):
        """Writes processor_config.json, the tokenizer and this Python file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        name = Path(__file__).stem
        config = {
            "processor_class": type(self).__name__,
            "auto_map": {"AutoProcessor": f"{name}.{type(self).__name__}"},
            "text": self.tokenizer is not None,
            "image": self.image,
            "max_length": self.max_length,
            "numbers": self.numbers,
            "categories": self.categories,
        }
        (folder / FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        (folder / f"{name}.py").write_bytes(Path(__file__).read_bytes())
