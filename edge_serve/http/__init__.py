"""Handles HTTP below the endpoints: connections, the guard, access, errors, the page."""
