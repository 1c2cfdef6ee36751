"""Text and image-text embeddings."""
