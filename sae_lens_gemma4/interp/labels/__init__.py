"""Labels of latents: made by judges, tested on what they have not seen, scored, and written down."""
