"""The model that ships: a small Stable Diffusion of emoji drawings, and its detector."""
