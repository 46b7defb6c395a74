"""Makes, runs and explains command lines of NVIDIA's ``trtexec``."""
