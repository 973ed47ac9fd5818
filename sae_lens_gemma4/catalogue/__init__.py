"""Which public SAEs on Gemma 4 exist, as data, and how their files are read."""

LOADER = "gemma4"
"""The name under which sae_lens knows the loader of the releases here; `plugin.py` registers it."""
