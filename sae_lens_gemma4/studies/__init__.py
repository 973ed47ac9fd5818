"""What `sae-lens-gemma4 interp …` runs: each reading of a model or its latents is one recipe, one run, one report."""
