"""A device's own roll-out of a bundle: fetched, judged, switched to, watched, or taken back."""

SWITCH_TIMEOUT_S = 900
"""Seconds for which the service may open a bundle of 8B."""
WATCH_S = 600
"""Seconds for which a new bundle is watched."""
MAX_WATCH_S = 86_400
"""Largest number that either may be."""
PERPLEXITY_RATIO = 1.08
"""Perplexity of a new bundle over that of the old one, from which on it is worse."""
