"""Adding a direction to the residual stream while a model answers, with the controls that tell what it did."""
