"""Decides votes among several answers to one question.

Here: what the answer of a sample is, where a thought can be ended, and the test that says when
enough samples agree. It knows texts and counts only: drawing samples is in `edge.runtime.vote`, and
ending a thought in `edge.runtime.stop_when_sure`.
"""
