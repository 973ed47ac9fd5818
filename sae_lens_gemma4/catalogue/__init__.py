"""Which public SAEs on Gemma 4 exist, as data, and how their files are read."""
