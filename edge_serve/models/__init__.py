"""The bundles that one server holds: opening, routing, replacing, requests in flight."""
