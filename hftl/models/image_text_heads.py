"""The heads of `modeling_image_text`: fusion of two encoders for a classifier, and projections into a shared space.

This file needs torch only. It travels with every saved model.

Shapes: B batch, T text tokens, S places of the image's feature map, D feature size, F width of the fusion, K outputs,
N numbers, M categories, P size of the shared space.
"""

import torch
from torch import nn

_HEADS = 4
"""Of the cross attention."""
_UNKNOWN = 0.05
"""Share of the categories that training replaces by the unknown one, so that this one is learnt too."""


def masked_mean(tokens, mask):
    """Returns the mean [B, D] of the tokens [B, T, D] that the mask [B, T] counts in."""
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


class Side(nn.Module):
    """Features of one encoder [B, …, D] -> [B, …, F]; a vector stands for what a row does not have.

    It is learnt where training shows such rows, else it is 0.
    """

    def __init__(self, size, width, learns_missing):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.linear = nn.Linear(size, width)
        self.missing = nn.Parameter(torch.randn(width) * 0.02) if learns_missing else None

    def forward(self, features, present):
        """Returns the projected features, `missing` in the rows where `present` [B] is False."""
        projected = self.linear(self.norm(features.to(self.norm.weight.dtype)))
        present = present.view(-1, *[1] * (features.ndim - 1))
        return torch.where(present, projected, 0.0 if self.missing is None else self.missing.to(projected.dtype))


class FusionHead(nn.Module):
    """Joins what the encoders see with the numbers and categories of a row, and ends in the logits.

    Args:
        config: The model's.
        image_size: D of the image vectors; None without images.
        map_size: D of the image's feature map.
        text_size: D of text vectors and tokens; None without texts.
    """

    def __init__(self, config, image_size, map_size, text_size):
        super().__init__()
        width = config.fusion_dim
        self.modality_dropout = config.modality_dropout
        both = image_size is not None and text_size is not None
        crossed = both and config.fusion == "cross_attention"
        learns = config.modality_dropout > 0
        of_image = map_size if crossed else image_size
        self.image = Side(of_image, width, learns) if image_size is not None else None
        self.text = Side(text_size, width, learns) if text_size is not None else None
        self.join = None
        if both:
            kind = {"concat": Concat, "gated": Gated, "cross_attention": CrossAttention}[config.fusion]
            self.join = kind(width, config.fusion_dropout)
        self.crossed = crossed
        self.table = (
            TabularEncoder(config.numbers, config.categories, width)
            if config.numbers["names"] or config.categories
            else None
        )
        size = self.join.size if both else width * (image_size is not None or text_size is not None)
        size += width * (self.table is not None)
        self.classifier = nn.Sequential(
            nn.Linear(size, width), nn.GELU(), nn.Dropout(config.fusion_dropout), nn.Linear(width, config.num_labels)
        )

    def forward(self, image, text, mask, image_present, text_present, numbers, categories):
        """Returns logits [B, K].

        Args:
            image: Vector [B, D] and map [B, S, D'], or two times None.
            text: Vector [B, D] and tokens [B, T, D], or two times None.
            mask: [B, T] of the tokens.
            image_present: [B] bool or None (all).
            text_present: [B] bool or None (all).
            numbers: [B, N] or None (all missing).
            categories: [B, M] or None (all unknown).
        """
        like = next(value for value in (image[0], text[0], numbers, categories) if value is not None)
        batch, device = len(like), like.device
        chosen = 1 if self.crossed else 0
        image_present = _presence(image[0], image_present, batch, device)
        text_present = _presence(text[0], text_present, batch, device)
        if self.training and self.modality_dropout and self.join is not None:
            image_present, text_present = _drop(image_present, text_present, self.modality_dropout)
        seen = self._side(self.image, image[chosen], image_present)
        read = self._side(self.text, text[chosen], text_present)
        parts = [part for part in (seen, read) if part is not None]
        if self.join is not None:
            parts = [self.join(seen, read, mask if text[0] is not None else None, text_present)]
        if self.table is not None:
            parts.append(self.table(numbers, categories, batch, device))
        return self.classifier(torch.cat(parts, -1))

    def _side(self, side, features, present):
        if side is None:
            return None
        if features is None:
            size = side.norm.normalized_shape[0]
            shape = (len(present), 1, size) if self.crossed else (len(present), size)
            features = side.norm.weight.new_zeros(shape)
        return side(features, present)


def _presence(features, present, batch, device):
    if features is None:
        return torch.zeros(batch, dtype=torch.bool, device=device)
    return torch.ones(batch, dtype=torch.bool, device=device) if present is None else present.bool()


def _drop(image_present, text_present, share):
    """Takes the image or the text (either as often) from a share of the rows that have both."""
    drawn = torch.rand(len(image_present), device=image_present.device)
    both = image_present & text_present
    return image_present & ~(both & (drawn < share / 2)), text_present & ~(both & (drawn >= 1 - share / 2))


class Concat(nn.Module):
    """Both vectors, their product and their absolute difference (as InferSent compares two sentences).

    Conneau et al. 2017, https://arxiv.org/abs/1705.02364, section 3: without the last
    two a network must learn to compare.
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
    """One transformer block in which the words look at the places of the image, then the mean of the words."""

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
        """Returns [B, F] from the image's map [B, S, F] and the tokens [B, T, F] with their mask [B, T]."""
        places = self.places(image)
        text = text + self.attention(self.words(text), places, places, need_weights=False)[0]
        text = text + self.feed_forward(text)
        return masked_mean(text, torch.ones(text.shape[:2], device=text.device) if mask is None else mask)


class TabularEncoder(nn.Module):
    """Numbers and categories of a row -> one vector [B, F].

    Numbers are standardised by the training rows; a missing one is their mean, and an indicator says so where training
    rows lacked some too. Categories are embedded; id 0 stands for missing ones and those that training never saw.
    """

    def __init__(self, numbers, categories, width):
        super().__init__()
        self.register_buffer("mean", torch.tensor(numbers["mean"], dtype=torch.float32))
        self.register_buffer("std", torch.tensor(numbers["std"], dtype=torch.float32))
        # weights of an indicator that was 0 in all training rows are as they were drawn
        learnt = torch.tensor(numbers.get("missing", [True] * len(numbers["mean"])), dtype=torch.float32)
        self.register_buffer("missing_learnt", learnt)
        self.embeddings = nn.ModuleList(
            # the size that fastai's tabular models use
            nn.Embedding(len(values) + 1, min(width, round(1.6 * (len(values) + 1) ** 0.56)))
            for values in categories.values()
        )
        size = 2 * len(numbers["mean"]) + sum(embedding.embedding_dim for embedding in self.embeddings)
        self.linear = nn.Sequential(nn.Linear(size, width), nn.GELU())

    def forward(self, numbers, categories, batch, device):
        """Returns [B, F] from numbers [B, N] and ids [B, M]; None stands for missing ones."""
        if numbers is None:
            numbers = torch.full((batch, len(self.mean)), float("nan"), device=device)
        if categories is None:
            categories = torch.zeros(batch, len(self.embeddings), dtype=torch.long, device=device)
        if self.training:
            categories = categories.masked_fill(torch.rand(categories.shape, device=device) < _UNKNOWN, 0)
        missing = numbers.isnan()
        standard = torch.where(missing, 0.0, (numbers - self.mean) / self.std)
        parts = [
            standard,
            missing * self.missing_learnt,
            *(embed(categories[:, i]) for i, embed in enumerate(self.embeddings)),
        ]
        return self.linear(torch.cat([part.to(self.mean.dtype) for part in parts], -1))


class Projection(nn.Module):
    """Two linear maps into one space, and the temperature of its similarities.

    The temperature starts, and the scale is held below 100, as in CLIP (https://arxiv.org/abs/2103.00020, section 2.5);
    for SigLIP temperature and bias start as in https://arxiv.org/abs/2303.15343, section 3.2.
    """

    def __init__(self, config, image_size, text_size):
        super().__init__()
        self.image = nn.Linear(image_size, config.projection_dim, bias=False)
        self.text = nn.Linear(text_size, config.projection_dim, bias=False)
        sigmoid = config.objective == "siglip"
        self.logit_scale = nn.Parameter(torch.tensor(10.0 if sigmoid else 1 / 0.07).log())
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None

    def forward(self, image, text):
        """Returns the embeddings [B, P] of vectors [B, D] (None of None), the scale and the bias."""
        found = [
            None if vectors is None else nn.functional.normalize(linear(vectors), dim=-1)
            for linear, vectors in ((self.image, image), (self.text, text))
        ]
        return (*found, self.logit_scale.exp().clamp(max=100), self.logit_bias)
