"""Preprocessing: image transforms, tokenization, sliding windows and multimodal examples."""
