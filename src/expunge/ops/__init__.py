"""Numbers only: pure torch, no diffusers."""
