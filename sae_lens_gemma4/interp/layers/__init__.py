"""What each layer's residual stream is: how far from its tokens, and what it would say if it were the last."""
