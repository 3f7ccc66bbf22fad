"""Images: datasets, decoding, preprocessing, views and random images."""
