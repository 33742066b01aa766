"""The training step, optimisers, devices, and which parameters are trained."""
