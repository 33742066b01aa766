"""Vision Transformers in JAX and Flax: train, fine-tune, evaluate and use them."""
