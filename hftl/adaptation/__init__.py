"""Adaptation methods: full fine-tuning, frozen backbone, LoRA, and one method per encoder."""
