"""Several answers to one question: what each of them says, and when they settle it."""
