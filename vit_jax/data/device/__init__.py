"""What happens to a batch on the devices: augmentation, mixing, normalisation."""
