"""The first edition, in a clone alone: a small Stable Diffusion of emoji drawings, and its detector."""
