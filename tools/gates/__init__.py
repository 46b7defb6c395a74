"""Holds the code to budgets, words and tests that notice mistakes."""
