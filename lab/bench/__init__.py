"""Speed and memory of a model, of the service and of what is in front of it."""
