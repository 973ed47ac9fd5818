"""Text in, activations out: corpora of packed and masked blocks, and the forward pass that harvests them."""
