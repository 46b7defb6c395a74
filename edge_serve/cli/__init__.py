"""The verbs serve, batch, config, key and man."""
