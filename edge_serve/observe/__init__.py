"""What others see of the server: metrics, logs, and messages to systemd."""
