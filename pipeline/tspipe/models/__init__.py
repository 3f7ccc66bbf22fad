"""Networks, their weights, and their split into backbone and classifier."""
