"""From a name to a model that knows its backbone from its head."""
