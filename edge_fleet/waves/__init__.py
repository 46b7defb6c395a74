"""Brings many devices to one bundle in waves: the wanted state, and what each device reports.

A vendor signs a wanted state. A receiver hands it out and opens one wave after the other, by the
devices' reports. Devices only dial out: a timer polls, and a device whose wave has come rolls the
bundle out by itself.
"""
