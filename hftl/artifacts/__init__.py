"""From a trained model to a folder that the rest of the ecosystem opens."""
