"""Shows the state of the server to others: metrics, logs, and messages to systemd."""
