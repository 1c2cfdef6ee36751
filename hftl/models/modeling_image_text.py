"""An image encoder of timm and a text encoder of transformers, joined: a classifier, and a dual encoder.

This file and its heads need torch, timm and transformers only. They travel with every saved model, so that
`AutoModel.from_pretrained(folder, trust_remote_code=True)` opens it anywhere.

Shapes: B batch, C channels, H W height and width, T text tokens, S places of the image's feature map, D feature size,
F width of the fusion, K outputs, P size of the shared space.
"""

from dataclasses import dataclass

import timm
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from .image_text_heads import FusionHead, Projection, masked_mean

FUSIONS = ("concat", "gated", "cross_attention")
OBJECTIVES = ("infonce", "siglip")


class ImageTextConfig(PreTrainedConfig):
    """What the two encoders are and how they are joined.

    Args:
        vision: `architecture` (timm), `arguments` for it, and `data`, its preprocessing (timm's data config); None
            where there are no images.
        text: The text encoder's own configuration; None where there are no texts.
        pooling: How token features become one vector: `mean` or `cls`.
        fusion: One of `FUSIONS` (classifier).
        fusion_dim: F, a multiple of 4.
        fusion_dropout: Dropout probability in the fusion.
        modality_dropout: Share of the training rows that lose their image or their text.
        numbers: `names`, and `mean` and `std` of the training rows, a list each, of the numeric columns.
        categories: Values of each categorical column by its name; position i has id i + 1, and 0 is anything else.
        projection_dim: P (dual encoder).
        objective: One of `OBJECTIVES`: which start the temperature has, and whether there is a bias (dual encoder).
    """

    model_type = "image_text"

    def __init__(
        self,
        vision=None,
        text=None,
        pooling="mean",
        fusion="concat",
        fusion_dim=256,
        fusion_dropout=0.1,
        modality_dropout=0.0,
        numbers=None,
        categories=None,
        projection_dim=256,
        objective="infonce",
        **kwargs,
    ):
        self.vision = vision
        self.text = text
        self.pooling = pooling
        self.fusion = fusion
        self.fusion_dim = fusion_dim
        self.fusion_dropout = fusion_dropout
        self.modality_dropout = modality_dropout
        self.numbers = numbers or {"names": [], "mean": [], "std": []}
        self.categories = categories or {}
        self.projection_dim = projection_dim
        self.objective = objective
        super().__init__(**kwargs)


class ImageTextDualConfig(ImageTextConfig):
    """The same for the dual encoder: transformers' `AutoModel` knows a model by its configuration."""

    model_type = "image_text_dual"

    def __init__(self, **kwargs):  # without one of its own, transformers would make a bare dataclass of it
        super().__init__(**kwargs)


class ImageTextEncoders(PreTrainedModel):
    """The two encoders, without a head: what both models share."""

    config_class = ImageTextConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.image_encoder = self._new_image_encoder() if config.vision else None
        self.text_encoder = self._new_text_encoder() if config.text else None

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """See `PreTrainedModel.from_pretrained`; it leaves buffers empty that no checkpoint holds, as timm has some."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._fill_buffers()
        return loaded

    def _new_image_encoder(self):
        vision = self.config.vision
        net = timm.create_model(vision["architecture"], pretrained=False, num_classes=0, **vision["arguments"])
        if not any(value.is_meta for value in net.parameters()):
            for module in net.modules():  # timm's initialisation stays: transformers would draw it anew
                module._is_hf_initialized = True
        return net

    def _new_text_encoder(self):
        options = dict(self.config.text)
        net = AutoModel.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
        if getattr(net, "pooler", None) is not None:
            net.pooler = None  # unused here, and never trained in most checkpoints
        return net

    def _fill_buffers(self):
        net = self.image_encoder
        lacking = dict(net.named_buffers()).keys() - net.state_dict().keys() if net is not None else ()
        if not lacking:
            return
        with torch.device("cpu"):
            filled = dict(self._new_image_encoder().named_buffers())
        own = dict(net.named_buffers())
        for name in lacking:
            own[name].copy_(filled[name])

    @property
    def image_size(self):
        """D of the image vectors."""
        return getattr(self.image_encoder, "head_hidden_size", self.image_encoder.num_features)

    @property
    def text_size(self):
        """D of the text vectors and tokens."""
        return self.text_encoder.config.hidden_size

    @property
    def vector_sizes(self):
        """D of the image and of the text vectors; 0 where there is no such encoder."""
        image = self.image_size if self.image_encoder is not None else 0
        return [image, self.text_size if self.text_encoder is not None else 0]

    def encode(self, pixel_values=None, input_ids=None, attention_mask=None, token_type_ids=None, **kwargs):
        """Returns the vectors of both encoders side by side [B, D + D'], what `forward` takes as `vectors`."""
        found = [] if self.image_encoder is None else [self.encode_image(pixel_values)[0]]
        if self.text_encoder is not None:
            found.append(self.encode_text(input_ids, attention_mask, token_type_ids)[0])
        return torch.cat([part.float() for part in found], -1)

    def encode_image(self, pixel_values):
        """Returns the vector [B, D] and the feature map as a sequence [B, S, D'] of images [B, C, H, W]."""
        net = self.image_encoder
        features = net.forward_features(pixel_values)
        vectors = net.forward_head(features, pre_logits=True).flatten(1)
        if features.ndim == 4:
            last = getattr(net, "output_fmt", "NCHW") == "NHWC"
            features = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
        return vectors, features

    def encode_text(self, input_ids, attention_mask, token_type_ids=None):
        """Returns the pooled vector [B, D] and the token features [B, T, D] of token ids [B, T]."""
        inputs = {"attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        tokens = self.text_encoder(input_ids, **inputs).last_hidden_state  # peft's wrapper wants the first by position
        return (tokens[:, 0] if self.config.pooling == "cls" else masked_mean(tokens, attention_mask)), tokens


class ImageTextForClassification(ImageTextEncoders):
    """Image, text, numbers and categories -> fusion -> logits [B, K]; any of them may be missing in a row.

    Regression is the same with `problem_type` `regression`, as in transformers.
    """

    def __init__(self, config):
        super().__init__(config)
        self.fusion = FusionHead(
            config,
            self.image_size if config.vision else None,
            self.image_encoder.num_features if config.vision else None,
            self.text_size if config.text else None,
        )
        self.post_init()

    def forward(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        image_present=None,
        text_present=None,
        numbers=None,
        categories=None,
        vectors=None,
        labels=None,
        **kwargs,
    ):
        """Returns logits [B, K], and the mean loss where labels are given.

        Args:
            pixel_values: [B, C, H, W]; None: no row has an image.
            input_ids: [B, T]; None: no row has a text.
            attention_mask: [B, T]; all tokens count where it is None.
            token_type_ids: [B, T], for encoders that have them.
            image_present: [B] bool, which rows have an image; all where it is None.
            text_present: [B] bool, likewise.
            numbers: [B, N] as in the table; NaN where a number is missing.
            categories: [B, M] ids as `ImageTextConfig.categories` has them.
            vectors: [B, D + D'] from `encode`, in place of images and texts; not for cross attention.
            labels: [B] classes, [B, K] of 0 and 1, or [B, K] numbers, as `config.problem_type` says.
            **kwargs: Ignored.
        """
        image = text = (None, None)
        if vectors is not None:
            image, text = ((part, None) for part in vectors.split(self.vector_sizes, -1))
            image, text = (side if side[0].shape[1] else (None, None) for side in (image, text))
        if pixel_values is not None and self.image_encoder is not None:
            image = self.encode_image(pixel_values)
        if input_ids is not None and self.text_encoder is not None:
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            text = self.encode_text(input_ids, attention_mask, token_type_ids)
        logits = self.fusion(image, text, attention_mask, image_present, text_present, numbers, categories)
        loss = None if labels is None else _loss(logits, labels, self.config.problem_type)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _loss(logits, labels, problem_type):
    if problem_type == "regression":
        return nn.functional.mse_loss(logits, labels.to(logits.dtype).view_as(logits))
    if problem_type == "multi_label_classification":
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return nn.functional.cross_entropy(logits, labels)


@dataclass
class ImageTextOutput(ModelOutput):
    """What the dual encoder gives.

    Attributes:
        image_embeds: [B, P] of length 1, or None without images.
        text_embeds: [B, P] of length 1, or None without texts.
        logit_scale: The factor that similarities are multiplied by: one over the temperature, a scalar.
        logit_bias: What is added then (SigLIP), a scalar, or None.
    """

    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    logit_scale: torch.FloatTensor | None = None
    logit_bias: torch.FloatTensor | None = None


class ImageTextDualEncoder(ImageTextEncoders):
    """Images and texts -> one space, in which what belongs together is near."""

    config_class = ImageTextDualConfig

    def __init__(self, config):
        super().__init__(config)
        self.projection = Projection(config, self.image_size, self.text_size)
        self.post_init()

    def get_image_features(self, pixel_values):
        """Returns [B, P] of length 1 from images [B, C, H, W]."""
        return self(pixel_values=pixel_values).image_embeds

    def get_text_features(self, input_ids, attention_mask=None, token_type_ids=None):
        """Returns [B, P] of length 1 from token ids [B, T]."""
        return self(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).text_embeds

    def forward(
        self, pixel_values=None, input_ids=None, attention_mask=None, token_type_ids=None, vectors=None, **kwargs
    ):
        """Returns `ImageTextOutput`; either input may be absent, then there are no embeddings of it.

        A row may have several texts, `input_ids` [B, W, T] and `text_embeds` [B, W, P]: where the mask of a text is all
        zeros there is none, and its embedding is zero. `vectors` [B, D + D'] from `encode` stand for both inputs.
        """
        if vectors is not None:
            return ImageTextOutput(*self.projection(*vectors.split(self.vector_sizes, -1)))
        image = self.encode_image(pixel_values)[0] if pixel_values is not None else None
        text = several = None
        if input_ids is not None:
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if input_ids.ndim == 3:
                several = attention_mask.any(-1)
                input_ids, attention_mask = input_ids[several], attention_mask[several]
                token_type_ids = None if token_type_ids is None else token_type_ids[several]
            text = self.encode_text(input_ids, attention_mask, token_type_ids)[0]
        image, text, scale, bias = self.projection(image, text)
        if several is not None:
            spread = text.new_zeros(*several.shape, text.shape[-1])
            spread[several] = text
            text = spread
        return ImageTextOutput(image, text, scale, bias)


ImageTextConfig.register_for_auto_class()
ImageTextDualConfig.register_for_auto_class()
ImageTextForClassification.register_for_auto_class("AutoModel")
ImageTextDualEncoder.register_for_auto_class("AutoModel")
