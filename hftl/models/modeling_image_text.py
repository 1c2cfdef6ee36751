"""Image-text models with a timm image encoder and a transformers text encoder: a classifier and a dual encoder.

This file and `image_text_heads` need torch, timm and transformers only. They are saved with every model, so that
`AutoModel.from_pretrained(folder, trust_remote_code=True)` loads it without hftl.

Shapes: B batch size, C channels, H W height and width, T text tokens, S spatial positions of the feature map, D feature
size, F fusion size, K outputs, P size of the shared space.
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
    """Configuration of both encoders and of the head.

    Args:
        vision: `architecture` (timm), its `arguments`, and `data`, its preprocessing (timm's data config); None
            without images.
        text: Configuration of the text encoder; None without texts.
        pooling: Pooling of token features: `mean` or `cls`.
        fusion: One of `FUSIONS` (classifier).
        fusion_dim: F, a multiple of 4.
        fusion_dropout: Dropout probability in the fusion.
        modality_dropout: Probability of dropping the image or the text of a training row.
        numbers: `names`, `mean` and `std` over the training rows, one list each, for the numeric columns.
        categories: Values of each categorical column, by column name; the value at position i has id i + 1, any other
            value has id 0.
        projection_dim: P (dual encoder).
        objective: One of `OBJECTIVES`: selects the initial temperature and whether there is a bias (dual encoder).
    """

    model_type = "image_text"
    # names of these settings in configs of earlier versions
    attribute_map = {"fusion_size": "fusion_dim", "projection_size": "projection_dim"}

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
    """Configuration of the dual encoder: `AutoModel` maps each configuration class to one model class."""

    model_type = "image_text_dual"

    def __init__(self, **kwargs):  # without __init__, transformers turns the class into a dataclass
        super().__init__(**kwargs)


class ImageTextEncoders(PreTrainedModel):
    """Base class of both models: the two encoders, without a head."""

    config_class = ImageTextConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.image_encoder = self._new_image_encoder() if config.vision else None
        self.text_encoder = self._new_text_encoder() if config.text else None

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads like `PreTrainedModel.from_pretrained`, and fills timm's non-persistent buffers, left empty by it."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._fill_buffers()
        return loaded

    def _new_image_encoder(self):
        vision = self.config.vision
        net = timm.create_model(vision["architecture"], pretrained=False, num_classes=0, **vision["arguments"])
        if not any(value.is_meta for value in net.parameters()):
            for module in net.modules():  # keep timm's initialization, which transformers would overwrite
                module._is_hf_initialized = True
        return net

    def _new_text_encoder(self):
        options = dict(self.config.text)
        net = AutoModel.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
        if getattr(net, "pooler", None) is not None:
            net.pooler = None  # unused here, and untrained in most checkpoints
        return net

    def _fill_buffers(self):
        net = self.image_encoder
        nonpersistent = dict(net.named_buffers()).keys() - net.state_dict().keys() if net is not None else ()
        if not nonpersistent:
            return
        with torch.device("cpu"):
            initialized = dict(self._new_image_encoder().named_buffers())
        buffers = dict(net.named_buffers())
        for name in nonpersistent:
            buffers[name].copy_(initialized[name])

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
        """D of the image vectors and of the text vectors; 0 without such an encoder."""
        image = self.image_size if self.image_encoder is not None else 0
        return [image, self.text_size if self.text_encoder is not None else 0]

    def encode(self, pixel_values=None, input_ids=None, attention_mask=None, token_type_ids=None, **kwargs):
        """Returns the concatenated vectors of both encoders [B, D + D'], the `vectors` input of `forward`."""
        vectors = [] if self.image_encoder is None else [self.encode_image(pixel_values)[0]]
        if self.text_encoder is not None:
            vectors.append(self.encode_text(input_ids, attention_mask, token_type_ids)[0])
        return torch.cat([value.float() for value in vectors], -1)

    def encode_image(self, pixel_values):
        """Returns the vector [B, D] and the feature map as a sequence [B, S, D'] of images [B, C, H, W]."""
        net = self.image_encoder
        features = net.forward_features(pixel_values)
        vectors = net.forward_head(features, pre_logits=True).flatten(1)
        if features.ndim == 4:
            channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
            features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        return vectors, features

    def encode_text(self, input_ids, attention_mask, token_type_ids=None):
        """Returns the pooled vector [B, D] and the token features [B, T, D] of token ids [B, T]."""
        inputs = {"attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        tokens = self.text_encoder(input_ids, **inputs).last_hidden_state  # peft requires input_ids by position
        return (tokens[:, 0] if self.config.pooling == "cls" else masked_mean(tokens, attention_mask)), tokens


class ImageTextForClassification(ImageTextEncoders):
    """Classifier or regressor on images, texts, numbers and categories; any of them may be missing in a row.

    As in transformers, `problem_type` selects classification, multi-label classification or regression.
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
        """Returns logits [B, K], and the mean loss if labels are passed.

        Args:
            pixel_values: [B, C, H, W]; None: no row has an image.
            input_ids: [B, T]; None: no row has a text.
            attention_mask: [B, T]; None: all tokens are attended to.
            token_type_ids: [B, T], for encoders with token types.
            image_present: [B] bool, whether a row has an image; None: all rows have one.
            text_present: [B] bool, whether a row has a text; None: all rows have one.
            numbers: [B, N], not standardized; NaN for a missing number.
            categories: [B, M] ids, as defined by `ImageTextConfig.categories`.
            vectors: [B, D + D'] from `encode`, instead of images and texts; unsupported for cross attention.
            labels: [B] classes, [B, K] zeros and ones, or [B, K] numbers, depending on `config.problem_type`.
            **kwargs: Ignored.
        """
        image = text = (None, None)
        if vectors is not None:
            image, text = (
                (value, None) if value.shape[1] else (None, None) for value in vectors.split(self.vector_sizes, -1)
            )
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
    """Output of the dual encoder.

    Attributes:
        image_embeds: Unit vectors [B, P]; None without images.
        text_embeds: Unit vectors [B, P]; None without texts.
        logit_scale: Factor of the similarities, the inverse temperature; a scalar.
        logit_bias: Term added to the scaled similarities (SigLIP), a scalar; None for CLIP's objective.
    """

    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    logit_scale: torch.FloatTensor | None = None
    logit_bias: torch.FloatTensor | None = None


class ImageTextDualEncoder(ImageTextEncoders):
    """Dual encoder that projects images and texts into a shared space, as in CLIP and SigLIP."""

    config_class = ImageTextDualConfig

    def __init__(self, config):
        super().__init__(config)
        self.projection = Projection(config, self.image_size, self.text_size)
        self.post_init()

    def get_image_features(self, pixel_values):
        """Returns unit vectors [B, P] for images [B, C, H, W]."""
        return self(pixel_values=pixel_values).image_embeds

    def get_text_features(self, input_ids, attention_mask=None, token_type_ids=None):
        """Returns unit vectors [B, P] for token ids [B, T]."""
        return self(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).text_embeds

    def forward(
        self, pixel_values=None, input_ids=None, attention_mask=None, token_type_ids=None, vectors=None, **kwargs
    ):
        """Returns `ImageTextOutput`; embeddings of an absent input are None.

        A row may have W texts: `input_ids` [B, W, T] give `text_embeds` [B, W, P]. A text whose mask is all zeros is
        padding and has a zero embedding. `vectors` [B, D + D'] from `encode` replace both inputs.
        """
        if vectors is not None:
            return ImageTextOutput(*self.projection(*vectors.split(self.vector_sizes, -1)))
        image = self.encode_image(pixel_values)[0] if pixel_values is not None else None
        text = is_text = None
        if input_ids is not None:
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if input_ids.ndim == 3:
                is_text = attention_mask.any(-1)
                input_ids, attention_mask = input_ids[is_text], attention_mask[is_text]
                token_type_ids = None if token_type_ids is None else token_type_ids[is_text]
            text = self.encode_text(input_ids, attention_mask, token_type_ids)[0]
        image, text, scale, bias = self.projection(image, text)
        if is_text is not None:
            padded = text.new_zeros(*is_text.shape, text.shape[-1])
            padded[is_text] = text
            text = padded
        return ImageTextOutput(image, text, scale, bias)


ImageTextConfig.register_for_auto_class()
ImageTextDualConfig.register_for_auto_class()
ImageTextForClassification.register_for_auto_class("AutoModel")
ImageTextDualEncoder.register_for_auto_class("AutoModel")
