"""Measures bundles: quality, speed and drift, and writes reports of them.

`evaluate`, `tasks` and `strategies` judge answers; `compare`, `verify`, `layers` and `pictures`
compare a bundle or an engine with a reference; `bench` and its neighbours take times; `drift` and
`watch` notice changes later. Nothing here prints: that is the business of `edge_lab.cli`.
"""
