"""Continue-training: a published SAE goes on learning on the activations of another model."""
