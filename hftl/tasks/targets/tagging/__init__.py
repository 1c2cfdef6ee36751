"""Token classification (word tags)."""
