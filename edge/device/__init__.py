"""The machine: the only readers of /proc, /sys and libcuda."""
