"""A trained model as a file for other programs: ONNX, with float or 8-bit numbers, and StableHLO."""
