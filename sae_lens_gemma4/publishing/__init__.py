"""Publishing: a trained SAE becomes a repository whose card says what was measured, and which was read back."""
