"""Gemma 4 with hook points: what a layer is, what its activations are called, and the classes that hook them."""
