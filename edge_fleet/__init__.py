"""Carries bundles to devices, and puts many devices behind one endpoint (docs/fleet.md).

`registry` pushes and pulls bundles, and `signing` signs them. `rollout` switches one device to a
new bundle, and `waves` a whole fleet. `devices` runs HAProxy in front of devices, and `cli` has the
verbs pull, bundle and fleet. Answering requests belongs in `edge_serve`. This package builds on
`edge`, `edge_make`, `edge_lab` and `edge_serve`, and none of them imports it.
"""
