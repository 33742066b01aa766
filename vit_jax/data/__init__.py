"""From files to batches on the device: sources, preprocessing on the host, the loader, augmentation on the device."""
