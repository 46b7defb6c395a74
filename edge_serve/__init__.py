"""Serves bundles over HTTP: OpenAI's API and others, metrics, the chat page, and batches.

Everything about requests is here: protocols, queues and limits of clients, stored answers, and the
verbs ``serve``, ``batch``, ``config`` and ``key``. It builds on `edge`, `edge_make` and
`edge_lab`. What runs a model belongs in `edge`, what measures one in `edge_lab`, and what carries
bundles to devices in `edge_fleet`, which builds on this package.
"""
