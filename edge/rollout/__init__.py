"""A device's own roll-out of a bundle: fetched, judged, switched to, watched, or taken back."""
