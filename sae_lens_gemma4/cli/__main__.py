"""`python -m sae_lens_gemma4.cli`."""

from sae_lens_gemma4.cli import main

main()
