"""Judges: what says what a latent stands for, and where a label applies; language models, and baselines without one."""
