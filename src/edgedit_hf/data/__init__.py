"""Images, captions, latents and texts, and the batches of a training step."""
