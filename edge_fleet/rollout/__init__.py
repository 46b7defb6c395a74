"""Rolls a bundle out on a device: fetch, judge, switch, watch, and keep or take back."""

SWITCH_TIMEOUT_S = 900
"""Seconds that the service may take to open a bundle of 8B."""
WATCH_S = 600
"""Seconds that a new bundle is watched."""
MAX_WATCH_S = 86_400
"""The largest value that either of them may have."""
PERPLEXITY_RATIO = 1.08
"""Ratio of a new bundle's perplexity to the old one's from which on the new one is worse."""
