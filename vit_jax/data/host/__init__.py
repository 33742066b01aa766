"""What happens to an example on the host: decoding, views."""
