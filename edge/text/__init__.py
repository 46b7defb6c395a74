"""Turns text into token ids and back: tokenizer, detokenizer, chat template, reasoning.

Here: pure functions of text and ids, and the child that runs unknown templates. It knows neither
engines nor requests; streams of a running answer are in `edge.runtime`.
"""
