"""condot trains image generators from scratch and ships them."""
