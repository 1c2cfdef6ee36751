"""Model families: pretrained networks with a new head, split into backbone and head."""
