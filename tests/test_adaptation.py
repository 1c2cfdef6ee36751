"""Adaptation methods: trainable and frozen parameters, buffers, adapters and new heads."""

from dataclasses import replace

import pytest
import torch

import hftl
from hftl.config.schema import AdaptConfig, LoraConfig
from hftl.errors import AdaptError, ModelError


def build(run, task_class):
    run, splits, task = hftl.setup_run(run, task_class)
    torch.manual_seed(0)
    return run, splits, task, hftl.build_model(run, task.head)


def train(run, task_class, **adapt_options):
    """Trains a model with `fit`, and returns it with the initial state dict of its network."""
    run = replace(run, adapt=replace(run.adapt, **adapt_options))
    run, splits, task, model = build(run, task_class)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    hftl.adapt(model, run.adapt)
    hftl.fit(hftl.create_accelerator(run), model, task, splits, run)
    return model, before


def original_state(model):
    """Returns the current state dict by original names, without peft's untrained copy of the head."""
    state = model.net.state_dict()
    return {model.original_name(name): value for name, value in state.items() if ".original_module." not in name}


@pytest.mark.parametrize("net", ["test_resnet", "test_vit", "test_convnext"])
def test_frozen_image_backbone_preserves_state_bitwise(net, image_run):
    model, before = train(image_run(net, "frozen"), hftl.ImageClassification)
    check_frozen(model, before)


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_frozen_text_backbone_preserves_state_bitwise(pooling, text_run):
    model, before = train(text_run("frozen", pooling), hftl.TextClassification)
    check_frozen(model, before)


def check_frozen(model, before):
    for name, value in original_state(model).items():
        is_unchanged = torch.equal(value, before[name])
        assert is_unchanged != model.in_head(name), name
    assert any("num_batches_tracked" in name for name in before) or not any(
        isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()
    )


@pytest.mark.parametrize("case", ["test_resnet", "test_vit", "test_convnext", "default", "mean"])
def test_lora_preserves_base_and_merged_logits(case, image_run, text_run):
    is_text = case in ("default", "mean")
    run = text_run("lora", case) if is_text else image_run(case, "lora")
    task_class = hftl.TextClassification if is_text else hftl.ImageClassification
    run, splits, task, model = build(run, task_class)
    rows = task.encode(splits["test"], model.processor, None, None)
    inputs = task.collate(rows.fetch(range(len(rows)), 0))["inputs"]
    model.eval()
    with torch.no_grad():
        initial = model(inputs)["logits"]
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    counts = hftl.adapt(model, run.adapt)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(inputs)["logits"], initial)

    trainable = {model.original_name(name) for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in trainable if ".lora_" in name}
    assert {name.partition(".lora_")[0] for name in adapters} == set(counts.targets)
    assert trainable - adapters == {name for name in before if model.in_head(name)}
    assert not any(model.in_head(name) for name in counts.targets)

    hftl.fit(hftl.create_accelerator(run), model, task, splits, run)
    for name, value in original_state(model).items():
        if ".lora_" not in name and not model.in_head(name):
            assert torch.equal(value, before[name]), name  # includes running statistics
    model.eval()
    with torch.no_grad():
        adapted = model(inputs)["logits"]
        net = model.net.merge_and_unload()
        merged = net(**inputs)["logits"] if is_text else net(inputs["pixel_values"])
    assert not torch.allclose(adapted, initial, atol=1e-3)
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-4)


def test_lora_skips_first_layer_and_depthwise_convolutions(image_run):
    run, _, _, model = build(image_run("test_convnext", "lora"), hftl.ImageClassification)
    targets = hftl.adapt(model, run.adapt).targets
    assert "stem.0" not in targets and targets
    assert not any("conv_dw" in name for name in targets)


def test_lora_target_modules_match_layers_or_raise(image_run):
    run, _, _, model = build(image_run("test_vit", "lora"), hftl.ImageClassification)
    counts = hftl.adapt(model, AdaptConfig("lora", LoraConfig(target_modules=["qkv", r"blocks\.\d+\.mlp\.fc1"])))
    assert {name.rpartition(".")[2] for name in counts.targets} == {"qkv", "fc1"}
    _, _, _, model = build(replace(run, overwrite=True), hftl.ImageClassification)
    with pytest.raises(AdaptError, match=r"'projj' matches no .*Did you mean 'proj'"):
        hftl.adapt(model, AdaptConfig("lora", LoraConfig(target_modules=["qkv", "projj"])))


@pytest.mark.parametrize(
    ("batch_norm", "pretrained", "updates"),
    [("auto", True, False), ("train", True, True), ("auto", False, True), ("frozen", False, False)],
)
def test_full_batch_norm_preserves_or_updates_statistics(batch_norm, pretrained, updates, image_run):
    run = image_run("test_resnet", "full", max_steps=2)
    run = replace(run, model=replace(run.model, pretrained=pretrained))
    model, before = train(run, hftl.ImageClassification, batch_norm=batch_norm)
    statistics = {name for name in before if "running_" in name}
    updated = {name for name in statistics if not torch.equal(original_state(model)[name], before[name])}
    assert updated == (statistics if updates else set())


def test_parameter_counts_match_model_totals(text_run):
    run, _, _, model = build(text_run("lora"), hftl.TextClassification)
    total = sum(p.numel() for p in model.parameters())
    counts = hftl.adapt(model, run.adapt)
    assert counts.backbone + counts.head == total
    assert counts.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert str(counts.adapters) in str(counts).replace(",", "")


def test_head_of_equal_width_is_reinitialized(text_run, tmp_path, texts):
    """transformers silently loads the pretrained head if the number of classes matches."""
    import shutil

    from transformers import AutoConfig, AutoModelForSequenceClassification

    run = text_run("full", "default")
    config = AutoConfig.from_pretrained(run.model.name, num_labels=3, id2label={0: "x", 1: "y", 2: "z"})
    old = AutoModelForSequenceClassification.from_pretrained(run.model.name, config=config)
    torch.nn.init.constant_(old.classifier.weight, 7.0)
    old.save_pretrained(tmp_path / "old")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{run.model.name}/{file}", tmp_path / "old")
    run = replace(run, model=replace(run.model, name=str(tmp_path / "old")))
    _, _, _, model = build(run, hftl.TextClassification)
    assert model.head_modules == ("classifier",)
    assert not (model.net.classifier.weight == 7.0).any()
    assert model.net.classifier.weight.std() > 0
    assert model.net.config.id2label == {0: "animal", 1: "food", 2: "tool"}


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_checkpoint_with_other_prefix_matches_weights(pooling, text_run, tmp_path):
    """A masked language model stores `bert.…`; loading it under another prefix silently gives random weights."""
    from shutil import copy

    from transformers import AutoModelForMaskedLM

    run = text_run("frozen", pooling)
    AutoModelForMaskedLM.from_pretrained(run.model.name).save_pretrained(tmp_path / "mlm")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        copy(f"{run.model.name}/{file}", tmp_path / "mlm")
    _, _, _, reference = build(run, hftl.TextClassification)
    run = replace(run, model=replace(run.model, name=str(tmp_path / "mlm")))
    _, _, _, model = build(run, hftl.TextClassification)
    layer = f"{model.net.base_model_prefix}.encoder.layer.1.output.dense.weight"
    assert torch.equal(model.net.get_parameter(layer), reference.net.get_parameter(layer))
    assert not any("encoder" in name or "embeddings" in name for name in model.head_modules)


def test_checkpoint_lacking_backbone_weights_raises(text_run, tmp_path):
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    run = text_run("full", "default")
    folder = copytree(run.model.name, tmp_path / "cut")
    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "layer.1." not in name}, folder / "model.safetensors")
    for pooling in ("default", "mean"):
        cut = replace(run, model=replace(run.model, name=str(folder), pooling=pooling))
        with pytest.raises(ModelError, match="lacks weights of the backbone"):
            build(cut, hftl.TextClassification)


def test_lora_skips_weight_standardized_layers(image_run):
    """A merged update of such a weight would be standardized too."""
    run = image_run("test_resnet", "lora")
    run = replace(run, model=replace(run.model, name="test_nfnet", pretrained=False, image_size=32))
    _, _, _, model = build(run, hftl.ImageClassification)
    standardized = {
        name.removeprefix("net.") for name, module in model.named_modules() if "Std" in type(module).__name__
    }
    targets = set(hftl.adapt(model, run.adapt).targets)
    assert standardized and targets and not targets & standardized


def test_evaluate_preserves_training_mode_of_frozen_model(text_run):
    run, splits, task, model = build(text_run("frozen", "mean"), hftl.TextClassification)
    hftl.adapt(model, run.adapt)
    accelerator = hftl.create_accelerator(run)
    model.train()
    before = {name: module.training for name, module in model.named_modules()}
    hftl.evaluate(accelerator, model, task, splits, run)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert before["net.classifier"] and before["net.dropout"] and not before["net.backbone.encoder"]
