"""What single latents do: where they fire, what they write, which others are like them."""
