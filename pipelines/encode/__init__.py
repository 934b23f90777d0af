"""`ex4d encode`: turn clips into latents."""
