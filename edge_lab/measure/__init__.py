"""What a bundle is worth: quality, speed, drift, and reports of them."""
