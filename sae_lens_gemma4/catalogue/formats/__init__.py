"""One module for each form in which an SAE lies on disk, each a loader with sae_lens's own signature."""
