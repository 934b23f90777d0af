"""`ex4d encode`: clips to latents."""
