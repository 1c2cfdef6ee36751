"""Text classifier on pooled token features, with the pooling of its sentence-transformers checkpoint.

This file needs torch and transformers only. It is saved with every model, so that
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)` loads it without hftl.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class PooledTextConfig(PreTrainedConfig):
    """Configuration of the backbone and of the pooling of its token features (`mean` or `cls`)."""

    model_type = "pooled_text"

    def __init__(self, backbone=None, pooling="mean", classifier_dropout=0.0, **kwargs):
        self.backbone = backbone or {}
        self.pooling = pooling
        self.classifier_dropout = classifier_dropout
        super().__init__(**kwargs)


class PooledTextForSequenceClassification(PreTrainedModel):
    """Backbone -> pooled features [B, D] -> linear -> logits [B, K]."""

    config_class = PooledTextConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config):
        super().__init__(config)
        options = dict(config.backbone)
        backbone_config = AutoConfig.for_model(options.pop("model_type"), **options)
        self.backbone = AutoModel.from_config(backbone_config)
        if getattr(self.backbone, "pooler", None) is not None:
            self.backbone.pooler = None  # unused here, and untrained in most such checkpoints
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(backbone_config.hidden_size, config.num_labels)
        self.post_init()

    @classmethod
    def from_backbone(cls, name, config, **kwargs):
        """Builds the model with the pretrained backbone `name` (repo id or folder) and a new classifier.

        Raises:
            ValueError: The checkpoint lacks weights of the backbone.
        """
        model = cls(config)
        options = {"config": model.backbone.config, "output_loading_info": True, **kwargs}
        backbone, info = AutoModel.from_pretrained(name, **options)
        missing = [key for key in info["missing_keys"] if "pooler" not in key]
        if missing or info["mismatched_keys"]:
            raise ValueError(f"{name} lacks weights of the backbone: {sorted(missing)[:5]} {info['mismatched_keys']}")
        weights = {key: value for key, value in backbone.state_dict().items() if not key.startswith("pooler.")}
        model.backbone.load_state_dict(weights)
        return model

    def pool(self, features, attention_mask):
        """Returns pooled features [B, D] of token features [B, T, D] with the attention mask [B, T]."""
        if self.config.pooling == "cls":
            return features[:, 0]
        weights = attention_mask.unsqueeze(-1).to(features.dtype)
        return (features * weights).sum(1) / weights.sum(1).clamp(min=1)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        """Returns logits [B, K], and the mean loss of the `problem_type` if labels are passed."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        features = self.backbone(**inputs).last_hidden_state
        logits = self.classifier(self.dropout(self.pool(features, attention_mask)))
        loss = self.loss(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def loss(self, logits, labels):
        """Returns the mean loss for classes [B], zeros and ones [B, K], or numbers [B, K] ([B] for one output)."""
        if self.config.problem_type == "regression":
            return nn.functional.mse_loss(logits, labels.reshape(logits.shape).to(logits.dtype))
        if self.config.problem_type == "multi_label_classification":
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return nn.functional.cross_entropy(logits, labels)
