"""Figures that tell a broken SAE from a few outlier tokens, and say on which tokens they were measured."""
