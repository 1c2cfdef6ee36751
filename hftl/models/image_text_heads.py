"""Heads of `modeling_image_text`: fusion of two encoders for a classifier, and projections into a shared space.

This file needs torch only. It is saved with every model.

Shapes: B batch size, T text tokens, S spatial positions of the feature map, D feature size, F fusion size, K outputs,
N numeric columns, M categorical columns, P size of the shared space.
"""

import torch
from torch import nn

_HEADS = 4
"""Heads of the cross attention."""
_UNKNOWN = 0.05
"""Probability of replacing a category by the unknown category in training, so that its embedding is trained."""


def masked_mean(tokens, mask):
    """Returns the mean [B, D] of the tokens [B, T, D] where the mask [B, T] is 1."""
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


class ModalityProjection(nn.Module):
    """Projection of the features of one encoder [B, …, D] -> [B, …, F], with a placeholder for rows without input.

    The placeholder is a trained vector if training has such rows (`trains_missing`), else 0.
    """

    def __init__(self, size, width, trains_missing):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, width)
        self.missing = nn.Parameter(torch.randn(width) * 0.02) if trains_missing else None

    def forward(self, features, present):
        """Returns the projected features; rows where `present` [B] is False get the placeholder."""
        projected = self.linear(self.norm(features.to(self.norm.weight.dtype)))
        present = present.view(-1, *[1] * (features.ndim - 1))
        return torch.where(present, projected, 0.0 if self.missing is None else self.missing.to(projected.dtype))


class FusionHead(nn.Module):
    """Classifier on image features, text features, numbers and categories of a row.

    Args:
        config: `ImageTextConfig` of the model.
        image_size: D of the image vectors; None without images.
        map_size: D of the image feature map.
        text_size: D of text vectors and tokens; None without texts.
    """

    def __init__(self, config, image_size, map_size, text_size):
        super().__init__()
        width = config.fusion_dim
        self.modality_dropout = config.modality_dropout
        has_both = image_size is not None and text_size is not None
        self.uses_sequences = has_both and config.fusion == "cross_attention"
        trains_missing = config.modality_dropout > 0
        image_input_size = map_size if self.uses_sequences else image_size
        self.image = ModalityProjection(image_input_size, width, trains_missing) if image_size is not None else None
        self.text = ModalityProjection(text_size, width, trains_missing) if text_size is not None else None
        self.join = None
        if has_both:
            fusion_class = {"concat": Concat, "gated": Gated, "cross_attention": CrossAttention}[config.fusion]
            self.join = fusion_class(width, config.fusion_dropout)
        self.table = (
            TabularEncoder(config.numbers, config.categories, width)
            if config.numbers["names"] or config.categories
            else None
        )
        size = self.join.size if has_both else width * (image_size is not None or text_size is not None)
        size += width * (self.table is not None)
        self.classifier = nn.Sequential(
            nn.Linear(size, width), nn.GELU(), nn.Dropout(config.fusion_dropout), nn.Linear(width, config.num_labels)
        )

    def forward(self, image, text, mask, image_present, text_present, numbers, categories):
        """Returns logits [B, K].

        Args:
            image: Vector [B, D] and feature map [B, S, D'], or (None, None).
            text: Vector [B, D] and tokens [B, T, D], or (None, None).
            mask: Attention mask [B, T] of the tokens.
            image_present: [B] bool; None: all rows have an image.
            text_present: [B] bool; None: all rows have a text.
            numbers: [B, N]; None: all missing.
            categories: [B, M]; None: all unknown.
        """
        reference = next(value for value in (image[0], text[0], numbers, categories) if value is not None)
        batch, device = len(reference), reference.device
        index = 1 if self.uses_sequences else 0
        image_present = _presence_mask(image[0], image_present, batch, device)
        text_present = _presence_mask(text[0], text_present, batch, device)
        if self.training and self.modality_dropout and self.join is not None:
            image_present, text_present = _drop_modalities(image_present, text_present, self.modality_dropout)
        image_features = self._project(self.image, image[index], image_present)
        text_features = self._project(self.text, text[index], text_present)
        features = [value for value in (image_features, text_features) if value is not None]
        if self.join is not None:
            features = [self.join(image_features, text_features, mask if text[0] is not None else None, text_present)]
        if self.table is not None:
            features.append(self.table(numbers, categories, batch, device))
        return self.classifier(torch.cat(features, -1))

    def _project(self, projection, features, present):
        if projection is None:
            return None
        if features is None:
            size = projection.norm.normalized_shape[0]
            shape = (len(present), 1, size) if self.uses_sequences else (len(present), size)
            features = projection.norm.weight.new_zeros(shape)
        return projection(features, present)


def _presence_mask(features, present, batch, device):
    if features is None:
        return torch.zeros(batch, dtype=torch.bool, device=device)
    return torch.ones(batch, dtype=torch.bool, device=device) if present is None else present.bool()


def _drop_modalities(image_present, text_present, probability):
    """Drops the image or the text (equally likely) of rows that have both, with this probability."""
    uniform = torch.rand(len(image_present), device=image_present.device)
    both = image_present & text_present
    drops_image, drops_text = uniform < probability / 2, uniform >= 1 - probability / 2
    return image_present & ~(both & drops_image), text_present & ~(both & drops_text)


class Concat(nn.Module):
    """Concatenation of both vectors, their product and their absolute difference, as in InferSent.

    Conneau et al. 2017, https://arxiv.org/abs/1705.02364, section 3: product and difference spare the network from
    learning the comparison.
    """

    def __init__(self, width, dropout):
        super().__init__()
        self.size = 4 * width
        self.dropout = nn.Dropout(dropout)

    def forward(self, image, text, mask, text_present):
        """Returns [B, 4 F] from two vectors [B, F]."""
        return self.dropout(torch.cat([image, text, image * text, (image - text).abs()], -1))


class Gated(nn.Module):
    """Gated multimodal unit (Arevalo et al. 2017, https://arxiv.org/abs/1702.01992, equations 1 to 5)."""

    def __init__(self, width, dropout):
        super().__init__()
        self.size = width
        self.image = nn.Linear(width, width)
        self.text = nn.Linear(width, width)
        self.gate = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, image, text, mask, text_present):
        """Returns [B, F] from two vectors [B, F]."""
        gate = torch.sigmoid(self.gate(torch.cat([image, text], -1)))
        return self.dropout(gate * torch.tanh(self.image(image)) + (1 - gate) * torch.tanh(self.text(text)))


class CrossAttention(nn.Module):
    """Transformer block with cross attention from text tokens to image positions, then mean pooling of the tokens."""

    def __init__(self, width, dropout):
        super().__init__()
        self.size = width
        self.words = nn.LayerNorm(width)
        self.places = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, _HEADS, dropout, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )

    def forward(self, image, text, mask, text_present):
        """Returns [B, F] from the feature map [B, S, F] and the tokens [B, T, F] with their mask [B, T]."""
        places = self.places(image)
        text = text + self.attention(self.words(text), places, places, need_weights=False)[0]
        text = text + self.feed_forward(text)
        return masked_mean(text, torch.ones(text.shape[:2], device=text.device) if mask is None else mask)


class TabularEncoder(nn.Module):
    """Encoder of the numbers and categories of a row into one vector [B, F].

    Numbers are standardized with training statistics. A missing number is replaced by the mean, with an indicator input
    if training rows miss numbers of this column too. Categories are embedded; id 0 is used for missing categories and
    those absent from training rows.
    """

    def __init__(self, numbers, categories, width):
        super().__init__()
        self.register_buffer("mean", torch.tensor(numbers["mean"], dtype=torch.float32))
        self.register_buffer("std", torch.tensor(numbers["std"], dtype=torch.float32))
        # an indicator that is 0 in all training rows has untrained weights: mask it
        is_trained = torch.tensor(numbers.get("missing", [True] * len(numbers["mean"])), dtype=torch.float32)
        self.register_buffer("missing_learnt", is_trained)
        self.embeddings = nn.ModuleList(
            # embedding size of fastai's tabular models
            nn.Embedding(len(values) + 1, min(width, round(1.6 * (len(values) + 1) ** 0.56)))
            for values in categories.values()
        )
        size = 2 * len(numbers["mean"]) + sum(embedding.embedding_dim for embedding in self.embeddings)
        self.linear = nn.Sequential(nn.Linear(size, width), nn.GELU())

    def forward(self, numbers, categories, batch, device):
        """Returns [B, F] from numbers [B, N] and category ids [B, M]; None: all values are missing."""
        if numbers is None:
            numbers = torch.full((batch, len(self.mean)), float("nan"), device=device)
        if categories is None:
            categories = torch.zeros(batch, len(self.embeddings), dtype=torch.long, device=device)
        if self.training:
            categories = categories.masked_fill(torch.rand(categories.shape, device=device) < _UNKNOWN, 0)
        missing = numbers.isnan()
        standardized = torch.where(missing, 0.0, (numbers - self.mean) / self.std)
        features = [
            standardized,
            missing * self.missing_learnt,
            *(embed(categories[:, i]) for i, embed in enumerate(self.embeddings)),
        ]
        return self.linear(torch.cat([value.to(self.mean.dtype) for value in features], -1))


class Projection(nn.Module):
    """Linear projections of both encoders into a shared space, with a trained temperature.

    Initial temperature and the upper bound 100 of the scale are those of CLIP (https://arxiv.org/abs/2103.00020,
    section 2.5); for SigLIP, initial temperature and bias are those of https://arxiv.org/abs/2303.15343, section 3.2.
    """

    def __init__(self, config, image_size, text_size):
        super().__init__()
        self.image = nn.Linear(image_size, config.projection_dim, bias=False)
        self.text = nn.Linear(text_size, config.projection_dim, bias=False)
        sigmoid = config.objective == "siglip"
        self.logit_scale = nn.Parameter(torch.tensor(10.0 if sigmoid else 1 / 0.07).log())
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None

    def forward(self, image, text):
        """Returns both embeddings [B, P] of vectors [B, D] (None for None), the logit scale and the logit bias."""
        embeddings = [
            None if vectors is None else nn.functional.normalize(linear(vectors), dim=-1)
            for linear, vectors in ((self.image, image), (self.text, text))
        ]
        return (*embeddings, self.logit_scale.exp().clamp(max=100), self.logit_bias)
