"""Two groups of items at every layer and latent, against what chance would show."""
