"""The main job, start to end, on the embedded models: `sae-lens-gemma4 demo`."""
