"""What each way of adapting moves, and what it must not."""

from dataclasses import replace

import pytest
import torch

import hftl
from hftl.config.schema import AdaptConfig, LoraConfig
from hftl.errors import AdaptError, ModelError


def built(run, kind):
    run, splits, task = hftl.setup_run(run, kind)
    torch.manual_seed(0)
    return run, splits, task, hftl.build_model(run, task.head)


def trained(run, kind, **adapt_options):
    """Returns a model after a real run of `fit`, and the state of its network before, by stock name."""
    run = replace(run, adapt=replace(run.adapt, **adapt_options))
    run, splits, task, model = built(run, kind)
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    hftl.adapt(model, run.adapt)
    hftl.fit(hftl.create_accelerator(run), model, task, splits, run)
    return model, before


def after(model):
    """Returns the current state by stock name; peft's spare copy of the head left out."""
    state = model.net.state_dict()
    return {model.original_name(name): value for name, value in state.items() if ".original_module." not in name}


@pytest.mark.parametrize("net", ["test_resnet", "test_vit", "test_convnext"])
def test_frozen_leaves_parameters_and_buffers_of_an_image_backbone_bit_for_bit(net, image_run):
    model, before = trained(image_run(net, "frozen"), hftl.ImageClassification)
    check_frozen(model, before)


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_frozen_leaves_parameters_and_buffers_of_bert_bit_for_bit(pooling, text_run):
    model, before = trained(text_run("frozen", pooling), hftl.TextClassification)
    check_frozen(model, before)


def check_frozen(model, before):
    for name, value in after(model).items():
        same = torch.equal(value, before[name])
        assert same != model.in_head(name), name
    assert any("num_batches_tracked" in name for name in before) or not any(
        isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()
    )


@pytest.mark.parametrize("case", ["test_resnet", "test_vit", "test_convnext", "default", "mean"])
def test_lora_is_identity_at_the_start_keeps_the_base_and_merges_to_the_same_logits(case, image_run, text_run):
    text = case in ("default", "mean")
    run = text_run("lora", case) if text else image_run(case, "lora")
    kind = hftl.TextClassification if text else hftl.ImageClassification
    run, splits, task, model = built(run, kind)
    rows = task.encode(splits["test"], model.processor, None, None)
    inputs = task.collate(rows.fetch(range(len(rows)), 0))["inputs"]
    model.eval()
    with torch.no_grad():
        plain = model(inputs)["logits"]
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    report = hftl.adapt(model, run.adapt)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(inputs)["logits"], plain)

    learning = {model.original_name(name) for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in learning if ".lora_" in name}
    assert {name.partition(".lora_")[0] for name in adapters} == set(report.targets)
    assert learning - adapters == {name for name in before if model.in_head(name)}
    assert not any(model.in_head(name) for name in report.targets)

    hftl.fit(hftl.create_accelerator(run), model, task, splits, run)
    for name, value in after(model).items():
        if ".lora_" not in name and not model.in_head(name):
            assert torch.equal(value, before[name]), name  # base and its running statistics untouched
    model.eval()
    with torch.no_grad():
        adapted = model(inputs)["logits"]
        merged = (
            model.net.merge_and_unload()(**inputs) if text else model.net.merge_and_unload()(inputs["pixel_values"])
        )
    merged = merged["logits"] if text else merged
    assert not torch.allclose(adapted, plain, atol=1e-3)
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-4)


def test_the_first_layer_and_depthwise_convolutions_get_no_adapter(image_run):
    run, _, _, model = built(image_run("test_convnext", "lora"), hftl.ImageClassification)
    targets = hftl.adapt(model, run.adapt).targets
    assert "stem.0" not in targets and targets
    assert not any("conv_dw" in name for name in targets)


def test_patterns_select_layers_and_one_without_match_is_an_error_with_the_nearest_names(image_run):
    run, _, _, model = built(image_run("test_vit", "lora"), hftl.ImageClassification)
    report = hftl.adapt(model, AdaptConfig("lora", LoraConfig(target_modules=["qkv", r"blocks\.\d+\.mlp\.fc1"])))
    assert {name.rpartition(".")[2] for name in report.targets} == {"qkv", "fc1"}
    _, _, _, model = built(replace(run, overwrite=True), hftl.ImageClassification)
    with pytest.raises(AdaptError, match=r"'projj' matches no .*Did you mean 'proj'"):
        hftl.adapt(model, AdaptConfig("lora", LoraConfig(target_modules=["qkv", "projj"])))


@pytest.mark.parametrize(
    ("setting", "pretrained", "moves"),
    [("auto", True, False), ("update", True, True), ("auto", False, True), ("keep", False, False)],
)
def test_a_full_run_keeps_or_updates_running_statistics_as_told(setting, pretrained, moves, image_run):
    run = image_run("test_resnet", "full", max_steps=2)
    run = replace(run, model=replace(run.model, pretrained=pretrained))
    model, before = trained(run, hftl.ImageClassification, batch_norm=setting)
    statistics = {name for name in before if "running_" in name}
    moved = {name for name in statistics if not torch.equal(after(model)[name], before[name])}
    assert moved == (statistics if moves else set())


def test_the_report_counts_every_parameter_once(text_run):
    run, _, _, model = built(text_run("lora"), hftl.TextClassification)
    total = sum(p.numel() for p in model.parameters())
    report = hftl.adapt(model, run.adapt)
    assert report.backbone + report.head == total
    assert report.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert str(report.adapters) in str(report).replace(",", "")


def test_a_checkpoint_with_a_head_of_equal_width_for_other_classes_gets_a_new_head(text_run, tmp_path, texts):
    """transformers would load the old classes' weights silently when the widths agree."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    run = text_run("full", "default")
    config = AutoConfig.from_pretrained(run.model.name, num_labels=3, id2label={0: "x", 1: "y", 2: "z"})
    old = AutoModelForSequenceClassification.from_pretrained(run.model.name, config=config)
    torch.nn.init.constant_(old.classifier.weight, 7.0)
    old.save_pretrained(tmp_path / "old")
    import shutil

    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{run.model.name}/{file}", tmp_path / "old")
    run = replace(run, model=replace(run.model, name=str(tmp_path / "old")))
    _, _, _, model = built(run, hftl.TextClassification)
    assert model.head_modules == ("classifier",)
    assert not (model.net.classifier.weight == 7.0).any()
    assert model.net.classifier.weight.std() > 0
    assert model.net.config.id2label == {0: "animal", 1: "food", 2: "tool"}


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_a_checkpoint_that_names_its_backbone_differently_is_loaded_all_the_same(pooling, text_run, tmp_path):
    """A masked language model holds `bert.…`; loading it under another prefix would train random weights in silence."""
    from shutil import copy

    from transformers import AutoModelForMaskedLM

    run = text_run("frozen", pooling)
    AutoModelForMaskedLM.from_pretrained(run.model.name).save_pretrained(tmp_path / "mlm")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        copy(f"{run.model.name}/{file}", tmp_path / "mlm")
    _, _, _, plain = built(run, hftl.TextClassification)
    run = replace(run, model=replace(run.model, name=str(tmp_path / "mlm")))
    _, _, _, model = built(run, hftl.TextClassification)
    layer = f"{model.net.base_model_prefix}.encoder.layer.1.output.dense.weight"
    assert torch.equal(model.net.get_parameter(layer), plain.net.get_parameter(layer))
    assert not any("encoder" in name or "embeddings" in name for name in model.head_modules)


def test_a_checkpoint_that_lacks_backbone_weights_is_refused(text_run, tmp_path):
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    run = text_run("full", "default")
    folder = copytree(run.model.name, tmp_path / "cut")
    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "layer.1." not in name}, folder / "model.safetensors")
    for pooling in ("default", "mean"):
        cut = replace(run, model=replace(run.model, name=str(folder), pooling=pooling))
        with pytest.raises(ModelError, match="lacks weights of the backbone"):
            built(cut, hftl.TextClassification)


def test_layers_that_change_their_weight_before_use_get_no_adapter(image_run):
    """Weight standardisation: an update merged into such a weight would be standardised too."""
    run = image_run("test_resnet", "lora")
    run = replace(run, model=replace(run.model, name="test_nfnet", pretrained=False, image_size=32))
    _, _, _, model = built(run, hftl.ImageClassification)
    standardised = {
        name.removeprefix("net.") for name, module in model.named_modules() if "Std" in type(module).__name__
    }
    targets = set(hftl.adapt(model, run.adapt).targets)
    assert standardised and targets and not targets & standardised


def test_a_frozen_model_goes_back_to_training_after_an_evaluation(text_run):
    run, splits, task, model = built(text_run("frozen", "mean"), hftl.TextClassification)
    hftl.adapt(model, run.adapt)
    accelerator = hftl.create_accelerator(run)
    model.train()
    before = {name: module.training for name, module in model.named_modules()}
    hftl.evaluate(accelerator, model, task, splits, run)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert before["net.classifier"] and before["net.dropout"] and not before["net.backbone.encoder"]
