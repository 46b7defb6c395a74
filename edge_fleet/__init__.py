"""Bundles on their way to devices, and many devices behind one endpoint; see ``docs/fleet.md``.

`registry` pushes and pulls, `rollout` switches a device, `signing` signs, `devices` runs HAProxy in
front of devices, `cli` has the verbs pull, bundle and fleet. It stands on `edge`, `edge_lab` and
`edge_serve`; none of them imports it.
"""
