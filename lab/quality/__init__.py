"""What quantization, sampling rules and clients do to answers."""
