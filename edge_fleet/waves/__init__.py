"""Many devices brought to one bundle in waves: what is wanted, and what became of it.

A vendor signs a wanted state; a receiver hands it out and opens one wave after the other by what
devices report. Devices dial out only: a timer polls, and whose wave has come rolls out by itself.
"""
