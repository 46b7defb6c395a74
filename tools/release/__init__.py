"""Makes releases and proves them."""
