"""Prompt pairs that differ in one thing, and the latents that tell their sides apart."""
